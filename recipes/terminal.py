"""What all commands share at the terminal: consoles, progress bars, exit codes and errors in one line."""

from __future__ import annotations

import contextlib
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from recipes.errors import RecipeError

OWN_PACKAGES = ("mixers", "bridges", "recipes")
EXIT_CODES = "Exit codes: 0 done, 1 a run or a check failed, 2 bad usage or input, 130 interrupted."

out = Console(highlight=False)
"""Results go here, to stdout."""
err = Console(highlight=False, stderr=True)
"""Progress and errors go here, to stderr."""

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the figures and rows as a results file."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Also draw them; the ending (.png, .svg) says how."),
]


Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu or cuda; by default cuda where there is one.")
]


class UsageError(RecipeError, ValueError):
    """What was asked for makes no sense, or would overwrite something."""


class Commands(TyperGroup):
    """A group of commands that turns errors into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the command line, for results files."""
        ctx.meta.setdefault("command", shlex.join(["linmu", *args]))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; with ``--debug`` errors come with their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            # Typer's own exceptions carry an exit code and print themselves.
            if debugging(ctx) or hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise
            err.print("[bold red]error:[/]", end=" ")
            err.print(_message(error), markup=False, soft_wrap=True)
            raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """Return 2 for bad usage or input, 1 for a run that failed."""
    if isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | PermissionError):
        return 2
    return 2 if _own(error) and not isinstance(error, RuntimeError | ArithmeticError) else 1


def command_line(ctx: typer.Context) -> str:
    """Return the command as it was typed."""
    return ctx.find_root().meta.get("command", "linmu")


def debugging(ctx: typer.Context) -> bool:
    """Return whether ``--debug`` was given, with which an error comes as it is."""
    return bool(ctx.find_root().params.get("debug"))


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs; yields a function to be told (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def spinner(description: str) -> Iterator[Callable[..., None]]:
    """Show a turning sign while the block runs; yields a function that says what is done now."""
    with err.status(description) as status:
        yield lambda *now: status.update(f"{description}: {' '.join(map(str, now))}")


def quiet_libraries() -> None:
    """Keep the libraries from printing their own progress and warnings; call before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _own(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in OWN_PACKAGES


def _message(error: Exception) -> str:
    if _own(error):
        return str(error)
    if isinstance(error, OSError):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {error} (unexpected; `linmu --debug …` shows where)"
