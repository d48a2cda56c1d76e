"""The files of a report hold every number, and say what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import plots, report_page
from recipes.report import Report
from recipes.results import Results
from tests.recipes.test_report import row
from tests.recipes.toys import recipe, stage

pytest.importorskip("matplotlib")

FOUND = Report(
    [
        row("text", "perplexity", "all", 20.0, 22.0),
        row("text", "perplexity", "fortunes", 20.0, 40.0),
        row("text", "agreement", "all", 1.0, 0.75),
        row("recall", "accuracy", "all", 0.5, 0.25),
        row("recall", "accuracy", "count 128", 0.0, 0.0),
    ],
    [{"layer": 0, "injected": 0.01, "chained": 0.1}, {"layer": 3, "injected": 0.02, "chained": 0.0}],
    [{**row("recall", "accuracy", "count 128", 0.25, 0.125), "form": "twice"}],
)
HISTORY = [
    {
        "stage": name,
        "step": step,
        "loss": 8.0 / step,
        "token_kd": 4.0 / step,
        "learning_rate": 1e-3,
        "tokens": 1000 * step,
        "seconds": 30.0 * step,
    }
    for name in ("one", "two")
    for step in (1, 2)
]


def panels_of(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.get_axes()}


def test_the_numbers_are_all_there(tmp_path: Path) -> None:
    found = report_page.results(FOUND, HISTORY, "linmu evaluate x")
    report_page.write(tmp_path / "new" / "report", recipe(stage()), found)
    written = Results.read(tmp_path / "new" / "report" / "report.json")
    assert written == found
    assert written.figures == {**FOUND.figures, "minutes": 2.0, "tokens": 4000}
    assert report_page.rows_of(written, "scores") == FOUND.rows
    assert report_page.rows_of(written, "forms") == FOUND.forms
    assert report_page.rows_of(written, "layers") == FOUND.layers
    assert report_page.rows_of(written, "history") == HISTORY


def test_the_page_has_a_table_a_task_and_measure_and_says_how_it_was_made(tmp_path: Path) -> None:
    plan = recipe(stage(), name="mine", description="What it is for.")
    report_page.write(tmp_path, plan, report_page.results(FOUND, HISTORY, "linmu evaluate x"))
    page = (tmp_path / "report.md").read_text()
    for line in (
        "# mine: student beside teacher",
        "What it is for.",
        "| `text_ppl_ratio` | 1.1 |",
        "| group | teacher | student | recovery | tokens |",
        "| fortunes | 20 | 40 | 0.5 | 10 |",
        "| group | teacher | student | recovery | questions |",
        "| count 128 | 0 | 0 | – | 10 |",
        "## recall: accuracy by form of question",
        "| group | form | teacher | student | recovery | questions |",
        "| count 128 | twice | 0.25 | 0.125 | 0.5 | 10 |",
        "| 3 | 0.02 | 0 |",
        "| two | token_kd | 4 | 2 |",
        "| two | 2 | 2,000 | 1 | 33.3 |",
    ):
        assert line in page.splitlines(), line
    assert "`linmu evaluate x` on " in page
    assert plan.to_yaml() in page
    assert (tmp_path / "report.png").name in page


def test_the_picture_shows_recoveries_errors_and_losses(tmp_path: Path, drawn: list[Any]) -> None:
    report_page.write(tmp_path, recipe(stage()), report_page.results(FOUND, HISTORY, "x"))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    panels = panels_of(drawn[0])
    recovery, layers, *losses = panels.values()
    assert [bar.get_width() for bar in recovery.patches] == pytest.approx([1 / 1.1, 0.5, 0.75, 0.5])
    assert {line.get_label(): list(line.get_xdata()) for line in layers.lines} == {
        "injected": [0, 3],
        "chained": [0],
    }
    assert layers.get_yscale() == "log"
    assert [axes.get_title() for axes in losses] == ["losses, stage 1 one", "losses, stage 2 two"]


def test_what_was_not_measured_is_not_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    plots.report(tmp_path / "r.png", "t", FOUND.rows[:1], [], [])
    assert len(drawn[0].get_axes()) == 1
    plots.report(tmp_path / "r.png", "t", FOUND.rows[:1], [{"layer": 0, "injected": 0.0, "chained": 0.0}], [])
    assert len(drawn[1].get_axes()) == 2
    with pytest.raises(plots.PlotError, match="teacher scores 0"):
        plots.report(tmp_path / "r.png", "t", FOUND.rows[-1:], [], [])
