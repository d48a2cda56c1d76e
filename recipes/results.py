"""Results files: every measured figure as JSON, with the command, device, versions and commit behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from recipes.errors import RecipeError
from recipes.replacing import replacing

Row = Mapping[str, Any]

PACKAGES = ("linmu", "torch", "transformers", "accelerate", "peft", "triton")


class ResultsError(RecipeError, ValueError):
    """A results file cannot be written as it is, or what was read is not one."""


@dataclass(frozen=True)
class Results:
    """What one command measured.

    Attributes:
        command: The command line that made it.
        figures: The few numbers that are quoted, by name. Accuracies and ratios are fractions.
        rows: The table behind them.
        date: When, UTC, ISO 8601.
        device: On what; see :func:`describe_device`.
        versions: Package → version, Python included.
        commit: Commit of the checkout that ran, ``-dirty`` if it had changes; None outside a checkout.
    """

    command: str
    figures: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    device: str = field(default_factory=lambda: describe_device())
    versions: dict[str, str] = field(default_factory=lambda: describe_versions())
    commit: str | None = field(default_factory=lambda: describe_commit())

    def write(self, path: Path | str) -> None:
        """Write the file, whole or not at all: a kill or a full disk leaves an older one as it was.

        Raises:
            ResultsError: A value is not JSON, NaN and infinities included.
        """
        ordered = ("command", "date", "device", "versions", "commit", "figures", "rows")
        content = {name: getattr(self, name) for name in ordered}
        try:
            text = json.dumps(content, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ResultsError(
                f"{path}: not written, a value is not JSON: {error}; found {_not_json(content)}."
            ) from error
        write_atomically(Path(path), text + "\n")

    @classmethod
    def read(cls, path: Path | str) -> Results:
        """Read a file that :meth:`write` made.

        Raises:
            ResultsError: It is not JSON, or has other fields.
        """
        try:
            content = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ResultsError(f"{path} is not JSON: {error}.") from error
        want = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != want:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ResultsError(
                f"{path} is no results file: it needs the fields {sorted(want)}, found {found}."
            )
        return cls(**content)

    @property
    def made_by(self) -> str:
        """Which command made the figures, on what: a line of Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = f", commit `{self.commit[:12]}`" if self.commit else ""
        fence = "``" if "`" in self.command else "`"
        return f"{fence}{self.command}{fence} on {self.device}, {self.date[:10]}{commit}; {versions}."


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_rows(
    path: Path,
    command: str,
    rows: list[dict[str, Any]],
    figures: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    join: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    read: Callable[[Path], Results] = Results.read,
) -> None:
    """Write rows as a results file, in the place of one that exists or added to it.

    Args:
        path: The file.
        command: What made the rows.
        rows: To write.
        figures: Works out the figures of all rows.
        join: Given the rows that the file has and these behind them, says which stay and in which order; other
            processes may add to the file at the same time. None: the older ones are left out.
        read: Reads the file, and refuses one of other rows.

    Raises:
        ResultsError: What shall be added to is not such a file, or a value is not JSON.
    """
    from recipes.data.packages import locked  # torch is slow to import

    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if join is not None and path.exists():
            old = read(path)
            command = " && ".join(dict.fromkeys([*old.command.split(" && "), command]))
            rows = join([*old.rows, *rows])
        Results(command, figures(rows), rows).write(path)


def describe_device() -> str:
    """Say what torch would compute on: the GPUs, or the processor and how many threads use it."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return " + ".join(f"{names.count(name)}× {name}" for name in dict.fromkeys(names))
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{_processor()}, {cores} cores" + ("" if threads == cores else f" ({threads} used)")


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, linmu and the packages that decide its figures, where installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def describe_commit() -> str | None:
    """Return the commit of the checkout that this package stands in; None if it stands in none."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        )
        if Path(top.stdout.strip()) != root:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def table(rows: Sequence[Row], title: str | None = None, columns: Iterable[str] | None = None) -> Table:
    """Lay rows out as a rich table.

    Args:
        rows: What to show; a missing or None value is shown as a dash.
        title: Printed above.
        columns: Keys to show, in order. Default: all, as they first occur.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for key in keys:
        numeric = any(isinstance(row.get(key), int | float) for row in rows)
        drawn.add_column(key.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(show(row.get(key))) for key in keys))
    return drawn


def markdown_table(rows: Sequence[Row], form: Callable[[Any], str] | None = None) -> str:
    """Write rows as a Markdown table; a column of numbers is aligned right, an empty one left out.

    Args:
        rows: What to write; a missing value is written as None is.
        form: Writes a value. Default: :func:`show`.
    """
    form = form or show
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if any(row.get(key) != "" for row in rows)
    ]
    numeric = {key for key in keys if all(isinstance(row.get(key), int | float | None) for row in rows)}
    lines = [[key.replace("_", " ") for key in keys], ["--:" if key in numeric else "---" for key in keys]]
    lines += [[form(row.get(key)).replace("|", "\\|") for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first_and_last(history: Sequence[Row]) -> list[dict[str, Any]]:
    """Sum a distillation's history up: one row a stage and loss, with its first and last logged value."""
    rows = []
    for stage in dict.fromkeys(entry["stage"] for entry in history):
        entries = [entry for entry in history if entry["stage"] == stage]
        for name in loss_names(entries):
            rows.append({"stage": stage, "loss": name, "first": entries[0][name], "last": entries[-1][name]})
    return rows


def spent(history: Sequence[Row]) -> list[dict[str, Any]]:
    """Sum up what a distillation cost, a row a stage.

    Returns:
        Each with ``stage``, ``steps``, ``tokens``, ``minutes``, ``tokens_a_second``, and of a run on a GPU
        ``gpu_busy``, the mean of what was seen at log entries, and ``peak_gib``; see
        :func:`recipes.trainer.gpu_load`.
    """
    rows = []
    for stage in dict.fromkeys(entry["stage"] for entry in history):
        entries = [entry for entry in history if entry["stage"] == stage]
        end = entries[-1]
        row = {"stage": stage, "steps": end["step"], "tokens": end["tokens"], "minutes": end["seconds"] / 60}
        row["tokens_a_second"] = end["tokens"] / end["seconds"] if end["seconds"] else None
        for name, together in (("gpu_busy", fmean), ("peak_gib", max)):
            if seen := [entry[name] for entry in entries if name in entry]:
                row[name] = together(seen)
        rows.append(row)
    return rows


def loss_names(history: Sequence[Row]) -> list[str]:
    """Return the keys of a history's entries that are losses, in order."""
    others = ("stage", "step", "learning_rate", "tokens", "seconds", "gpu_busy", "peak_gib")
    return [name for name in dict.fromkeys(key for entry in history for key in entry) if name not in others]


def show(value: Any) -> str:
    """Format a value for a table: integers in full, other numbers to three digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _not_json(value: Any, name: str = "") -> str:
    """Name the first values that JSON cannot hold."""
    if isinstance(value, Mapping):
        parts = [_not_json(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [_not_json(v, f"{name}[{i}]") for i, v in enumerate(value)]
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{name} = {value}"
    elif value is None or isinstance(value, str | int | float):
        return ""
    else:
        return f"{name} of type {type(value).__name__}"
    return ", ".join(part for part in parts if part)
