"""Results files: what is written can be read, whole or not at all; what is no number is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from recipes import results
from recipes.results import Results, ResultsError, first_and_last, loss_names, spent, table

FIELDS = ["command", "date", "device", "versions", "commit", "figures", "rows"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(figures=st.dictionaries(st.text(), JSON, max_size=4), rows=st.lists(st.dictionaries(st.text(), JSON)))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, figures: dict, rows: list) -> None:
    path = tmp_path_factory.mktemp("results") / "deeper" / "r.json"
    written = Results("linmu x", figures, rows, device="a device", versions={"torch": "2"}, commit=None)
    written.write(path)
    assert Results.read(path) == written
    assert list(json.loads(path.read_text())) == FIELDS


def test_says_where_it_was_made(tmp_path: Path) -> None:
    found = Results("linmu x", {})
    assert {"python", "linmu", "torch", "transformers"} <= set(found.versions)
    assert "cores" in found.device or "×" in found.device
    assert found.commit is None or len(found.commit.removesuffix("-dirty")) == 40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_value_that_is_not_json_is_named_and_the_older_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "r.json"
    Results("linmu x", {"a": 1}).write(path)
    before = path.read_text()
    with pytest.raises(ResultsError, match=r"figures\.speed\[1\]"):
        Results("linmu x", {"speed": [1.0, value]}).write(path)
    assert path.read_text() == before


def test_a_write_that_breaks_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[1]", '{"command": "x"}'])
def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"r\.json"):
        Results.read(path)


def test_the_table_shows_every_row_and_brackets_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table([{"name": "x [B, N]", "n": 12345}, {"name": "y", "n": None, "t": 0.12345}]))
    shown = console.file.getvalue()
    assert "x [B, N]" in shown
    assert "12,345" in shown
    assert "0.123" in shown
    assert shown.count("–") == 2


def test_a_history_is_summed_up_by_stage_and_loss() -> None:
    entry = {"learning_rate": 1.0, "tokens": 3, "seconds": 0.1}
    history = [
        {"stage": "a", "step": 1, "loss": 4.0, "kd": 3.0, **entry},
        {"stage": "a", "step": 2, "loss": 2.0, "kd": 1.0, **entry},
        {"stage": "b", "step": 1, "loss": 1.0, "task": 0.5, **entry},
    ]
    assert first_and_last(history) == [
        {"stage": "a", "loss": "loss", "first": 4.0, "last": 2.0},
        {"stage": "a", "loss": "kd", "first": 3.0, "last": 1.0},
        {"stage": "b", "loss": "loss", "first": 1.0, "last": 1.0},
        {"stage": "b", "loss": "task", "first": 0.5, "last": 0.5},
    ]


def test_what_a_run_cost_is_told_by_stage() -> None:
    def entry(stage: str, step: int, **more: float) -> dict[str, Any]:
        return {
            "stage": stage,
            "step": step,
            "loss": 1.0,
            "tokens": 60 * step,
            "seconds": 30.0 * step,
            **more,
        }

    history = [
        entry("a", 1, gpu_busy=0.5, peak_gib=3.0),
        entry("a", 2, gpu_busy=1.0, peak_gib=2.0),
        entry("b", 1, peak_gib=1.0),
        entry("c", 1),
    ]
    one = {"steps": 1, "tokens": 60, "minutes": 0.5, "tokens_a_second": 2.0}
    assert spent(history) == [
        {
            "stage": "a", "steps": 2, "tokens": 120, "minutes": 1.0, "tokens_a_second": 2.0,
            "gpu_busy": 0.75, "peak_gib": 3.0,
        },
        {"stage": "b", **one, "peak_gib": 1.0},
        {"stage": "c", **one},
    ]  # fmt: skip
    assert loss_names(history) == ["loss"]
