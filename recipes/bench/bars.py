"""What the kernels must reach on an H100 at 7B shapes, and whether the rows of a bench reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

TOKENS = 131072
"""Length at which times are compared."""
ATTENTION = "causal attention, cuDNN"
IDENTITY = ("table", "op", "by", "dtype", "row", "decay", "tokens")
"""Fields by which two rows are of the same thing."""


@dataclass(frozen=True)
class Bar:
    """A figure and what it must be.

    Attributes:
        figure: Name in the results file.
        what: What it is of.
        bar: What must be reached.
        stretch: What would be fine; None: nothing more.
        higher: Whether more is better.
    """

    figure: str
    what: str
    bar: float
    stretch: float | None = None
    higher: bool = False

    def verdict(self, value: float | None) -> str:
        """Say whether a value reaches the bar, and by how much it misses."""
        if value is None:
            return "not measured"
        if self._reaches(value, self.bar):
            return "met, the stretch too" if self._reaches(value, self.stretch) else "met"
        ratio = self.bar / value if self.higher else value / self.bar
        return f"missed by {ratio - 1:.0%}"

    def _reaches(self, value: float, goal: float | None) -> bool:
        return goal is not None and (value >= goal if self.higher else value <= goal)


BARS = (
    Bar("ssd_fwd_ms", "masked scan in both directions, decay per KV head, forward (ms)", 3.0, 2.0),
    Bar("ssd_fwd_speedup", "the same, over the best correct peer", 4.5, None, True),
    Bar("ssd_head_fwd_ms", "the same, decay per head (ms)", 4.0, 3.0),
    Bar("ssd_fwd_bwd_speedup", "forward + backward, over the best correct peer", 3.0, 5.0, True),
    Bar("ssd_causal_fwd_speedup", "one direction, text, forward, over the best correct peer", 1.3, 2.0, True),
    Bar("window_fwd_ms", "4×4×4 windows with shift, from raster order, forward (ms)", 1.5, 1.0),
    Bar("window_fwd_speedup", "the same, over partition + SDPA + merge", 1.5, None, True),
    Bar("window_fwd_bwd_speedup", "windows, forward + backward, over the same", 1.5, 2.5, True),
    Bar("step_over_bandwidth", "step, batch 256, over its bytes at the measured bandwidth", 1.3, 1.1),
    Bar("mmate_fwd_ms", "the whole mixing of mmate, forward (ms)", 6.0, 4.0),
    Bar(
        "crossover_fwd_tokens",
        "faster than cuDNN causal attention from so many tokens on, forward",
        8192,
        4096,
    ),
    Bar("crossover_fwd_bwd_tokens", "the same, forward + backward", 8192, 4096),
    Bar("linearity", "time a token at 1M tokens over that at 16k", 1.1),
    Bar("max_rel_rms_bf16", "largest relative RMS error in bf16, gradients included", 1e-2),
    Bar("max_rel_rms_fp32", "largest relative RMS error in fp32, gradients included", 1e-5),
)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Work out those figures of :data:`BARS` that the rows hold; others are left out.

    Args:
        rows: Of :func:`~recipes.bench.ops.measure_ops` and :func:`~recipes.bench.checks.check_table`.
    """
    found = {
        "ssd_fwd_ms": fastest(rows, "ssd", "ours", "fwd_ms"),
        "ssd_fwd_speedup": speedup(rows, "ssd", "fwd_ms"),
        "ssd_head_fwd_ms": fastest(rows, "ssd_head", "ours", "fwd_ms"),
        "ssd_fwd_bwd_speedup": speedup(rows, "ssd", "fwd_bwd_ms"),
        "ssd_causal_fwd_speedup": speedup(rows, "ssd_causal", "fwd_ms"),
        "window_fwd_ms": fastest(rows, "windows", "ours", "fwd_ms"),
        "window_fwd_speedup": speedup(rows, "windows", "fwd_ms"),
        "window_fwd_bwd_speedup": speedup(rows, "windows", "fwd_bwd_ms"),
        "step_over_bandwidth": _over_bandwidth(rows, "step"),
        "mmate_fwd_ms": fastest(rows, "mmate", "ours", "fwd_ms"),
        "crossover_fwd_tokens": crossover(rows, "fwd_ms"),
        "crossover_fwd_bwd_tokens": crossover(rows, "fwd_bwd_ms"),
        "linearity": _linearity(rows),
        "max_rel_rms_bf16": largest_error(rows, "bfloat16"),
        "max_rel_rms_fp32": largest_error(rows, "float32"),
    }
    return {name: value for name, value in found.items() if value is not None}


def fastest(rows: Sequence[Row], op: str, kind: str, value: str, tokens: int = TOKENS) -> float | None:
    """Return the least time of an op's rows of a kind at a length; None if there is none."""
    return _least(rows, value, lambda row: (row["op"], row["kind"], row["tokens"]) == (op, kind, tokens))


def speedup(rows: Sequence[Row], op: str, value: str, tokens: int = TOKENS) -> float | None:
    """Return the best correct peer's time over ours; None where one is missing."""
    ours, peer = (fastest(rows, op, kind, value, tokens) for kind in ("ours", "peer"))
    return None if ours is None or peer is None else peer / ours


def crossover(rows: Sequence[Row], value: str, op: str = "ssd") -> int | None:
    """Return the first length from which on ours is faster than causal attention at every length measured.

    None if there is none, or if one length alone was measured.
    """
    since = None
    lengths = sorted({row["tokens"] for row in _speed(rows) if row["by"] == ATTENTION and row.get(value)})
    for tokens in lengths if len(lengths) > 1 else ():
        attention = fastest([row for row in rows if row.get("by") == ATTENTION], op, "another", value, tokens)
        ours = fastest(rows, op, "ours", value, tokens)
        if attention is None or ours is None:
            continue
        since = None if ours >= attention else since or tokens
    return since


def largest_error(rows: Sequence[Row], dtype: str) -> float | None:
    """Return the largest error of the check's rows of a dtype; None if one failed or is no number."""
    checks = [row for row in rows if row["table"] == "check" and row["dtype"] == dtype]
    checks = [row for row in checks if row["right"] is not None]
    errors = [e for row in checks for e in (row["error"], row["gradient_error"]) if e is not None]
    lost = any(row["error"] is None for row in checks)
    return None if lost or not errors else max(errors)


def best_at(rows: Sequence[Row], tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Sum up the speed of every op at a length: ours, the best correct peer, the limits.

    Returns:
        A row an op and pass: ``op``, ``pass``, ``ours_ms``, ``by``, ``best_peer_ms``, ``peer``, ``speedup``,
        ``limit_ms`` (the larger of the two) and ``over_limit``. An op whose length is a batch is there too.
    """
    found = []
    speed = _speed(rows)
    for op in dict.fromkeys(row["op"] for row in speed):
        own = [row for row in speed if row["op"] == op]
        at = tokens if any(row["tokens"] == tokens for row in own) else max(row["tokens"] for row in own)
        for name, value in (("forward", "fwd_ms"), ("forward + backward", "fwd_bwd_ms")):
            here = [row for row in own if row["tokens"] == at and row.get(value)]
            ours, peer = (
                min((row for row in here if row["kind"] == kind), key=lambda row: row[value], default=None)
                for kind in ("ours", "peer")
            )
            if ours is None:
                continue
            limits = [ours.get("bytes_ms"), ours.get("products_ms")]
            limits = [ours.get("fwd_bwd_limit_ms")] if value == "fwd_bwd_ms" else limits
            limit = max((x for x in limits if x), default=None)
            found.append(
                {
                    "op": op,
                    "tokens": at,
                    "pass": name,
                    "by": ours["by"],
                    "ours_ms": ours[value],
                    "peer": peer["by"] if peer else None,
                    "best_peer_ms": peer[value] if peer else None,
                    "speedup": peer[value] / ours[value] if peer else None,
                    "limit_ms": limit,
                    "over_limit": ours[value] / limit if limit else None,
                }
            )
    return found


def summed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sum checks up: a row an op, implementation and dtype.

    Returns:
        ``op``, ``by``, ``dtype``, ``checks``, ``wrong`` (how many failed), the largest ``error`` and
        ``gradient_error``, and ``worst``: where the largest was. What a backend does not take is left out.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["right"] is None:
            continue
        key = (row["op"], row["by"], row["dtype"])
        total = found.setdefault(
            key,
            dict(zip(("op", "by", "dtype"), key))
            | {"checks": 0, "wrong": 0, "error": None, "gradient_error": None, "worst": None},
        )
        total["checks"] += 1
        total["wrong"] += not row["right"]
        before = max(total["error"] or 0, total["gradient_error"] or 0)
        for error in ("error", "gradient_error"):
            if row[error] is not None:
                total[error] = max(total[error] or 0.0, row[error])
        if max(row["error"] or 0, row["gradient_error"] or 0) >= before:
            total["worst"] = f"{row['row']}, {row['decay']} decay, {row['tokens']} tokens"
    return list(found.values())


def points(rows: Sequence[Row], tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Turn the forward passes of :func:`best_at` into points of a roofline.

    Returns:
        ``op``, ``kind`` (``"ours"``, or ``"peer"``, the best), ``intensity`` (operations a byte, at the fewest
        bytes) and ``tflops`` (reached). An op without matrix products, or without limits, has none.
    """
    machine = next((row for row in reversed(rows) if row["table"] == "machine"), None)
    if machine is None:
        return []
    found = []
    for best in best_at(rows, tokens):
        row = next(r for r in _speed(rows) if all(r[k] == best[k] for k in ("op", "by", "tokens")))
        if best["pass"] == "forward" and row.get("products_ms") and row.get("bytes_ms"):
            operations = row["products_ms"] * machine["matmul_tflops"]
            moved = row["bytes_ms"] * machine["copy_tb_per_second"]
            for kind, ms in (("ours", best["ours_ms"]), ("peer", best["best_peer_ms"])):
                if ms is not None:
                    point = {"intensity": operations / moved, "tflops": operations / ms}
                    found.append({"op": best["op"], "kind": kind, **point})
    return found


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order rows by table, op, kind, implementation, dtype and length; of rows of the same thing the last stays."""
    last = {_identity(row): place for place, row in enumerate(rows)}
    kept = [row for place, row in enumerate(rows) if last[_identity(row)] == place]
    tables, ops = (list(dict.fromkeys(row.get(key) for row in kept)) for key in ("table", "op"))
    return sorted(
        kept,
        key=lambda row: (
            tables.index(row.get("table")),
            ops.index(row.get("op")),
            str(row.get("kind")),
            str(row.get("by")),
            str(row.get("dtype")),
            row.get("tokens") or 0,
        ),
    )


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in IDENTITY)


def _speed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["table"] == "speed" and row["tokens"]]


def _least(rows: Sequence[Row], value: str, wanted: Callable[[Row], bool]) -> float | None:
    return min((row[value] for row in _speed(rows) if row.get(value) and wanted(row)), default=None)


def _over_bandwidth(rows: Sequence[Row], op: str) -> float | None:
    own = [row for row in _speed(rows) if (row["op"], row["kind"]) == (op, "ours") and row["tokens"] >= 256]
    return min((row["fwd_ms"] / row["bytes_ms"] for row in own if row.get("bytes_ms")), default=None)


def _linearity(rows: Sequence[Row]) -> float | None:
    first, last = (fastest(rows, "ssd", "ours", "ns_per_token", tokens) for tokens in (2**14, 2**20))
    return None if first is None or last is None else last / first
