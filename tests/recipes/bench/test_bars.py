"""Figures are read off the rows, and a bar says whether it is met and by how much it is missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.bench.bars import (
    ATTENTION,
    BARS,
    TOKENS,
    Bar,
    best_at,
    crossover,
    figures,
    largest_error,
    ordered,
    points,
    summed,
)
from recipes.results import Results, write_rows


def speed(op: str, by: str, kind: str, tokens: int | None = TOKENS, **values: Any) -> dict[str, Any]:
    return {
        "table": "speed",
        "op": op,
        "by": by,
        "kind": kind,
        "dtype": "bfloat16",
        "tokens": tokens,
        **values,
    }


def checked(
    op: str, dtype: str, error: float | None, gradient: float | None = None, **more: Any
) -> dict[str, Any]:
    row = {"table": "check", "op": op, "by": "triton", "dtype": dtype, "row": "text", "decay": "usual"}
    row |= {
        "tokens": 8,
        "error": error,
        "gradient_error": gradient,
        "worst": "x",
        "right": True,
        "note": None,
    }
    return row | more


ROWS = [
    {"table": "machine", "dtype": "bfloat16", "copy_tb_per_second": 2.0, "matmul_tflops": 800.0},
    speed(
        "ssd", "triton", "ours", fwd_ms=2.0, fwd_bwd_ms=6.0, bytes_ms=0.8, products_ms=0.5, ns_per_token=1.0
    ),
    speed("ssd", "reference", "ours", fwd_ms=90.0, fwd_bwd_ms=None),
    speed("ssd", "mamba_ssm", "peer", fwd_ms=16.0, fwd_bwd_ms=30.0),
    speed("ssd", "fla", "peer", fwd_ms=12.0, fwd_bwd_ms=None, note="no backward: it refuses"),
    speed("ssd", "shared", "another", fwd_ms=1.0, fwd_bwd_ms=1.0),
    speed("ssd", "absent", "peer", None, note="does not import"),
    speed("windows", "triton", "ours", fwd_ms=1.0, fwd_bwd_ms=None),
    speed("step", "triton", "ours", 256, fwd_ms=0.06, bytes_ms=0.05, products_ms=0.0, ns_per_token=1.0),
]


def test_speedups_are_over_the_best_correct_peer() -> None:
    found = figures(ROWS)
    assert found["ssd_fwd_ms"] == 2.0
    assert found["ssd_fwd_speedup"] == 6.0
    assert found["ssd_fwd_bwd_speedup"] == 5.0
    assert found["step_over_bandwidth"] == pytest.approx(1.2)
    assert found["window_fwd_ms"] == 1.0
    assert not found.keys() & {"window_fwd_speedup", "window_fwd_bwd_speedup", "linearity", "mmate_fwd_ms"}
    assert found.keys() <= {bar.figure for bar in BARS}


def test_a_row_each_says_what_is_best() -> None:
    best = {(row["op"], row["pass"]): row for row in best_at(ROWS)}
    assert set(best) == {
        ("ssd", "forward"),
        ("ssd", "forward + backward"),
        ("windows", "forward"),
        ("step", "forward"),
    }
    ssd = best["ssd", "forward"]
    assert (ssd["by"], ssd["peer"], ssd["speedup"], ssd["limit_ms"]) == ("triton", "fla", 6.0, 0.8)
    assert ssd["over_limit"] == 2.5
    assert best["windows", "forward"]["speedup"] is None
    assert best["step", "forward"]["tokens"] == 256


def test_points_of_the_roofline() -> None:
    found = {(point["op"], point["kind"]): point for point in points(ROWS)}
    assert set(found) == {("ssd", "ours"), ("ssd", "peer")}
    operations = 0.5e-3 * 800e12
    assert found["ssd", "ours"]["tflops"] == pytest.approx(operations / 2e-3 / 1e12)
    assert found["ssd", "ours"]["intensity"] == pytest.approx(operations / (0.8e-3 * 2e12))
    assert found["ssd", "peer"]["tflops"] == pytest.approx(operations / 12e-3 / 1e12)
    assert points(ROWS[1:]) == []


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((1, 2, 4), 1024), ((3, 2, 4), 2048), ((3, 9, 4), 4096), ((1, 2, 90), None), ((1, 9, 4), 4096)],
)
def test_the_crossover_is_where_ours_becomes_and_stays_faster(ours: tuple, expected: int | None) -> None:
    rows = []
    for tokens, mine, theirs in zip((1024, 2048, 4096), ours, (2, 4, 16)):
        rows.append(speed("ssd", "triton", "ours", tokens, fwd_ms=float(mine)))
        rows.append(speed("ssd", ATTENTION, "another", tokens, fwd_ms=float(theirs)))
    assert crossover(rows, "fwd_ms") == expected
    assert crossover(rows[-2:], "fwd_ms") is None


def test_linearity_is_from_16k_to_a_million() -> None:
    rows = [speed("ssd", "triton", "ours", n, ns_per_token=c) for n, c in ((2**14, 2.0), (2**20, 2.1))]
    assert figures(rows)["linearity"] == pytest.approx(1.05)
    assert "linearity" not in figures(rows[:1])


def test_the_largest_error_counts_gradients_and_is_unknown_where_one_is_no_number() -> None:
    rows = [checked("ssd", "float32", 1e-6, 3e-6), checked("windows", "float32", 2e-6)]
    rows.append(checked("ssd", "bfloat16", None, right=False))
    refused = checked("ssd", "float32", None, note="unsupported", right=None)
    crashed = checked("ssd", "float32", None, note="out of memory", right=False)
    assert largest_error([*rows, refused], "float32") == 3e-6
    assert largest_error([*rows, crashed], "float32") is None
    assert largest_error(rows, "bfloat16") is None
    (first, second, third) = summed([*rows, refused])
    assert (first["op"], first["checks"], first["wrong"], first["gradient_error"]) == ("ssd", 1, 0, 3e-6)
    assert first["worst"] == "text, usual decay, 8 tokens"
    assert (second["error"], second["gradient_error"]) == (2e-6, None)
    assert (third["dtype"], third["wrong"], third["error"]) == ("bfloat16", 1, None)


def test_verdicts() -> None:
    time = Bar("x", "a time", 3.0, 2.0)
    assert [time.verdict(v) for v in (None, 1.9, 2.5, 3.3)] == [
        "not measured",
        "met, the stretch too",
        "met",
        "missed by 10%",
    ]
    factor = Bar("y", "a speedup", 4.0, None, True)
    assert [factor.verdict(v) for v in (5.0, 2.0)] == ["met", "missed by 100%"]


def test_rows_are_added_to_a_file_and_the_same_ones_replaced(tmp_path: Path) -> None:
    def added(command: str, rows: list) -> tuple[str, list]:
        write_rows(path, command, rows, figures, join=ordered)
        results = Results.read(path)
        assert results.figures == figures(results.rows)
        return results.command, results.rows

    path = tmp_path / "ops.json"
    assert added("one", ROWS) == ("one", ROWS)
    newer = speed("ssd", "triton", "ours", fwd_ms=1.5)
    longer = speed("ssd", "triton", "ours", 2**20, fwd_ms=12.0)
    command, rows = added("two", [newer, longer, checked("ssd", "float32", 1e-6)])
    assert command == "one && two"
    times = {
        row["tokens"]: row["fwd_ms"]
        for row in rows
        if row.get("by") == "triton" and row["op"] == "ssd" and row["table"] == "speed"
    }
    assert times == {TOKENS: 1.5, 2**20: 12.0}
    assert len(rows) == len(ROWS) + 2
    assert added("two", [newer])[0] == "one && two"
