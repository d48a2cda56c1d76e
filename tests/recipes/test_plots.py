"""Every picture is written, as the ending says, and draws what it was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import plots

pytest.importorskip("matplotlib")

PREFILL = [
    {
        "tokens": n,
        "model": model,
        "seconds": n / 1000,
        "peak_mib": None if (model, n) == ("teacher", 4096) else n / 100,
    }
    for n in (1024, 2048, 4096)
    for model in ("teacher", "student")
]
DECODE = [{"tokens": n, "model": m, "state_mib": 1.0} for n in (1024, 4096) for m in ("teacher", "student")]
HISTORY = [
    {
        "stage": stage,
        "step": step,
        "loss": 1 / step,
        loss: 0.5 / step,
        "learning_rate": 1e-3,
        "tokens": 1,
        "seconds": 1,
    }
    for stage, loss in (("flex-ma", "hidden_states"), ("lora", "task"))
    for step in (1, 10, 20)
]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_demo_has_a_panel_for_each_measure_and_stage(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "demo.png"
    plots.demo(path, "title", {"teacher": 0.9, "stage 1": 0.5, "stage 2": 0.88}, PREFILL, DECODE, HISTORY)
    assert is_png(path)
    panels = drawn[0].axes
    assert len(panels) == 4 + 2
    assert [bar.get_height() for bar in panels[0].patches] == [0.9, 0.5, 0.88]
    lines = {line.get_label(): line for line in panels[2].lines}
    assert list(lines["student"].get_xdata()) == [1024, 2048, 4096]
    assert list(lines["teacher"].get_xdata()) == [1024, 2048]
    assert {"loss", "task"} == {line.get_label() for line in panels[5].lines}


def test_ops_have_a_roofline_and_a_panel_for_each_op_that_was_measured_at_lengths(
    tmp_path: Path, drawn: list[Any]
) -> None:
    machine = {"table": "machine", "copy_tb_per_second": 2.0, "matmul_tflops": 500.0}
    rows: list[dict[str, Any]] = [machine]
    for op, by, kind in (("ssd", "triton", "ours"), ("ssd", "them", "peer"), ("step", "triton", "ours")):
        for n in (4096, 131072) if op == "ssd" else (256,):
            values = {"fwd_ms": n / 1000, "fwd_bwd_ms": None if by == "them" else n / 300}
            limits = {"bytes_ms": n / 4000, "products_ms": n / 5000}
            rows.append({"table": "speed", "op": op, "by": by, "kind": kind, "tokens": n} | values | limits)
    rows.append({"table": "speed", "op": "ssd", "by": "absent", "kind": "peer", "tokens": None, "note": "no"})
    plots.ops(tmp_path / "o.png", "title", rows)
    assert is_png(tmp_path / "o.png")
    roofline, times = drawn[0].axes
    assert [list(c.get_offsets().data.shape) for c in roofline.collections] == [
        [1, 2],
        [1, 2],
        [1, 2],
        [0, 2],
    ]
    labels = [line.get_label() for line in times.lines]
    assert [label for label in labels if not label.startswith("_")] == ["triton", "them"]
    assert len(labels) == 3
    with pytest.raises(plots.PlotError, match="no op was measured"):
        plots.ops(tmp_path / "p.png", "title", [machine, rows[-1]])


def test_a_model_keeps_its_colour_in_every_panel(tmp_path: Path, drawn: list[Any]) -> None:
    plots.scaling(tmp_path / "p.png", "t", PREFILL, {"seconds": "s", "peak_mib": "MiB"})
    first, second = ({ln.get_label(): ln.get_color() for ln in axes.lines} for axes in drawn[0].axes)
    assert first["teacher"] == second["teacher"] != first["student"] == second["student"]


def test_the_ending_chooses_the_format(tmp_path: Path) -> None:
    plots.losses(tmp_path / "l.svg", "t", HISTORY)
    assert "<svg" in (tmp_path / "l.svg").read_text()
    plots.accuracies(tmp_path / "a.png", "t", {str(i): i / 13 for i in range(13)})
    assert is_png(tmp_path / "a.png")


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(plots.PlotError, match="empty"):
        plots.losses(tmp_path / "l.png", "t", [])
    assert not (tmp_path / "l.png").exists()


def test_without_matplotlib_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(plots.PlotError, match="pip install"):
        plots.accuracies(tmp_path / "a.png", "t", {"a": 1.0})
