"""The page on quality shows what was measured, recipe by recipe, and says what was not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recipes.results import Results
from tests.docs.pages import ROOT
from tests.docs.test_site import hooks as hooks

TEACHER = {"recipe": "teacher", "seed": None, "text perplexity all": 20.0, "recall accuracy copy 128": 0.9}


def run(recipe: str, seed: int, ratio: float, **more: Any) -> dict[str, Any]:
    figures = {
        "recipe": recipe,
        "seed": seed,
        "steps": 540,
        "tokens": 1_000_000,
        "minutes": 3.5,
        "ppl_ratio": ratio,
    }
    scores = {
        "text perplexity all": 20.0 * ratio,
        "recall accuracy copy 128": 0.25,
        "seconds_a_step lora": 0.5,
    }
    return {**figures, **scores, **more}


def test_the_page_has_a_place_for_every_file_and_says_which_is_absent(
    hooks: ModuleType, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    shown = hooks.quality_page(page, tmp_path)
    assert "<!-- docs/" not in shown
    for name in ("recovery_text", "ablations", "recovery_vlm"):
        assert f"Not measured yet: there is no `docs/results/{name}.json`." in shown
    assert hooks.quality_page("a\n<!-- docs/results/none.json -->\nb", tmp_path).startswith(
        "a\nNot measured yet"
    )


def test_a_recipe_is_a_row_in_the_summary_and_in_a_table_a_measure(hooks: ModuleType, tmp_path: Path) -> None:
    rows = [
        TEACHER,
        run("ours", 0, 1.084),
        run("peer-a", 0, 1.075),
        {"recipe": "bad", "seed": 0, "note": "no memory"},
    ]
    Results("linmu bench recovery", {}, rows, device="a chip").write(tmp_path / "recovery_text.json")
    lines = hooks.recovery_tables("recovery_text", tmp_path).splitlines()
    assert "| recipe | seeds | steps | tokens | minutes | ppl ratio | note |" in lines
    assert "| ours | 1 | 540 | 1,000,000 | 3.500 | 1.084 | – |" in lines
    assert "| bad | 1 | – | – | – | – | no memory |" in lines
    perplexities = lines[lines.index("**text: perplexity**") + 2 :]
    assert perplexities[0] == "| recipe | all |"
    assert perplexities[2:5] == ["| teacher | 20 |", "| ours | 21.7 |", "| peer-a | 21.5 |"]
    assert "| recipe | copy 128 |" in lines[lines.index("**recall: accuracy**") + 2]
    assert "| recipe | lora |" in lines[lines.index("**seconds a step**") + 2]
    assert lines[-1].startswith("`linmu bench recovery` on a chip")


def test_a_judge_with_a_name_and_what_is_told_by_stage_have_tables_of_their_own(
    hooks: ModuleType, tmp_path: Path
) -> None:
    more = {"recovery_long_video": 0.9, "text at 4096 perplexity all": 30.0, "gpu_busy lora": 0.875}
    Results("x", {}, [run("ours", 0, 1.0, **more)]).write(tmp_path / "recovery_text.json")
    lines = hooks.recovery_tables("recovery_text", tmp_path).splitlines()
    assert "recovery long video |" in lines[0]
    for heading, column, value in (
        ("text at 4096: perplexity", "all", "30"),
        ("gpu busy", "lora", "0.875"),
    ):
        start = lines.index(f"**{heading}**") + 2
        assert lines[start] == f"| recipe | {column} |"
        assert lines[start + 2] == f"| ours | {value} |"


def test_forms_of_question_are_lines_of_one_table(hooks: ModuleType, tmp_path: Path) -> None:
    forms = {"pictures form slideshow 64: after": 0.5, "pictures form slideshow 64: end": 0.75}
    rows = [{**TEACHER, **dict.fromkeys(forms, 1.0)}, run("ours", 0, 1.0, **forms)]
    Results("x", {}, rows).write(tmp_path / "recovery_vlm.json")
    lines = hooks.recovery_tables("recovery_vlm", tmp_path).splitlines()
    start = lines.index("**pictures: form**") + 2
    assert lines[start] == "| group: form | teacher | ours |"
    assert lines[start + 2 : start + 4] == [
        "| slideshow 64: after | 1.000 | 0.500 |",
        "| slideshow 64: end | 1.000 | 0.750 |",
    ]


def test_seeds_of_a_recipe_are_a_mean_and_a_spread(hooks: ModuleType) -> None:
    rows = [
        run("ours", 0, 1.0),
        run("ours", 1, 1.2),
        run("ours", 2, 1.1, note="cut short"),
        run("other", 0, 2.0),
    ]
    first, second = hooks.over_seeds(rows)
    assert first["seeds"] == 3
    assert first["ppl_ratio"] == "1.100 ± 0.100"
    assert first["tokens"] == 1_000_000
    assert first["note"] == "cut short"
    assert second["ppl_ratio"] == 2.0


def test_a_report_is_shown_whole(hooks: ModuleType, tmp_path: Path) -> None:
    score = {
        "task": "pictures",
        "measure": "accuracy",
        "teacher": 0.5,
        "student": 0.4,
        "recovery": 0.8,
        "count": 9,
    }
    rows = [
        {"table": "scores", "group": "names", **score},
        {"table": "layers", "layer": 0, "injected": 0.1, "chained": 0.2},
    ]
    Results("linmu evaluate x", {"pictures_recovery_mean": 0.8}, rows).write(tmp_path / "recovery_vlm.json")
    (tmp_path / "recovery_vlm.png").write_bytes(b"")
    shown = hooks.recovery_tables("recovery_vlm", tmp_path)
    for line in (
        "![recovery_vlm](results/recovery_vlm.png)",
        "### pictures: accuracy",
        "| names | 0.5 | 0.4 | 0.8 | 9 |",
        "| 0 | 0.1 | 0.2 |",
    ):
        assert line in shown.splitlines()


@pytest.mark.parametrize("name", ["recovery_text", "ablations", "recovery_vlm", "recovery_vlm_before"])
def test_the_page_of_all_results_leaves_them_to_their_own(
    name: str, hooks: ModuleType, tmp_path: Path
) -> None:
    Results("x", {"figure_of_it": 1.0}).write(tmp_path / f"{name}.json")
    assert "figure_of_it" not in hooks.results_page(tmp_path)


def test_a_command_that_quotes_another_stays_one_piece_of_code(hooks: ModuleType, tmp_path: Path) -> None:
    Results("a script, as `linmu x` now does", {}, [TEACHER]).write(tmp_path / "ablations.json")
    assert "``a script, as `linmu x` now does`` on" in hooks.recovery_tables("ablations", tmp_path)
