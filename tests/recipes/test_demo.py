"""The demo in small: the table, the picture and the figures are those of the run, good or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import demo
from recipes.plan import Recipe
from recipes.results import Results
from tests.recipes.toys import stage

pytest.importorskip("easy_vqa")


def recipe(learning_rate: float) -> Recipe:
    optimizer = {"learning_rate": learning_rate, "warmup": 0}
    stages = [
        stage(name="flex-ma", active=["flex_ma"], losses={"hidden_states": 1.0}, optimizer=optimizer),
        stage(name="all", optimizer=optimizer),
    ]
    fields = {
        "name": "small",
        "teacher": "tiny-vlm",
        "student": "mmate",
        "data": "easy-vqa",
        "stages": stages,
    }
    return Recipe.from_dict(fields)


@pytest.mark.parametrize(("learning_rate", "good"), [(1e-6, True), (10.0, False)])
def test_the_demo_reports_what_the_student_is_worth(
    learning_rate: float,
    good: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "STAGE_QUESTIONS", 10)
    monkeypatch.setattr(demo, "TARGET", 0.5)
    assert demo.run(tmp_path, recipe=recipe(learning_rate), questions=40, lengths=(64, 128)) is good
    found = Results.read(tmp_path / "demo.json")
    figures = found.figures
    assert set(figures) == {"teacher_accuracy", "student_accuracy", "recovery", "questions", "seconds"}
    assert figures["questions"] == 40
    assert figures["recovery"] == figures["student_accuracy"] / figures["teacher_accuracy"]
    assert (figures["recovery"] >= demo.TARGET) is good
    assert {(row["measure"], row["tokens"]) for row in found.rows} >= {("accuracy", None)}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "student" / "model.safetensors").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert f"{figures['recovery']:.1%} of the teacher's accuracy" in said
    assert ("falls short" in said) is not good
