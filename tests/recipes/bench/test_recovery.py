"""`linmu bench recovery`: a row a recipe and seed, beside its teacher's; what fails is a note."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from mixers.errors import UnknownMixerError
from recipes import yardstick
from recipes.bench.recovery import chosen, figures, ordered, scaled, write
from recipes.cli import app
from recipes.errors import InvalidRecipeError, UnknownRecipeError
from recipes.plan import Recipe
from recipes.results import Results
from tests.recipes import toys
from tests.recipes.toys import Riddles, recipe, stage, three_stages

MEASURES = ["accuracy", "perplexity", "agreement"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded of the toys that stand for teacher and data."""
    loaded: list[str] = []

    def load_teacher(spec: Any) -> Any:
        loaded.append(spec.model)
        return toys.teacher()

    def load_task(spec: Any, config: Any, tokenizer: Any) -> Riddles:
        loaded.append(spec.task)
        return Riddles(images=False)

    monkeypatch.setattr("recipes.bench.recovery.load_teacher", load_teacher)
    monkeypatch.setattr("recipes.yardstick.load_task", load_task)
    return loaded


def saved(folder: Path, name: str, *stages: dict[str, Any], **fields: Any) -> Path:
    judged_by = [{"task": "text", "measures": MEASURES[1:]}, {"task": "recall"}]
    made = recipe(*stages or [stage()], name=name, judged_by=judged_by, **fields)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made.to_dict()))
    return path


def linmu(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "recovery", *(str(a) for a in arguments)])


TEACHER = {"recipe": "the teacher", "ppl_ratio": 1.0}


def row(name: str, seed: int, **values: Any) -> dict[str, Any]:
    return {"recipe": name, "seed": seed, **values}


def test_the_table_has_a_row_a_recipe_and_seed_and_the_teachers(tmp_path: Path, loads: list[str]) -> None:
    main = saved(tmp_path, "main", stage(name="one", steps=4), stage(name="two", steps=1))
    peer = saved(tmp_path, "peer-a", student={"mixer": "sliding_window", "config": {"window": 2}})
    file, runs = tmp_path / "r.json", tmp_path / "runs"
    found = linmu(peer, main, "--scale", 0.5, "--seeds", "0,1", "--out", runs, "--json", file)
    assert found.exit_code == 0, found.output
    assert "ppl ratio" in found.output
    results = Results.read(file)
    teacher, *students = results.rows
    assert (teacher["recipe"], teacher["ppl_ratio"]) == ("the teacher", 1)
    names = [(r["recipe"], r["seed"], r["steps"]) for r in students]
    assert names == [("main", 0, 3), ("main", 1, 3), ("peer-a", 0, 1), ("peer-a", 1, 1)]
    for student in students:
        ratio = student["text perplexity all"] / teacher["text perplexity all"]
        assert student["ppl_ratio"] == pytest.approx(ratio)
        assert student["agreement"] == student["text agreement all"]
        assert student["tokens"] > 0
        assert student["minutes"] > 0
    assert {"seconds_a_step one", "seconds_a_step two"} <= set(students[0])
    means = [sum(r["ppl_ratio"] for r in pair) / 2 for pair in (students[:2], students[2:])]
    assert results.figures["ppl_ratio"] == pytest.approx(means[0])
    assert results.figures["best_peer_ppl_ratio"] == pytest.approx(means[1])
    assert loads.count("toy") == 1
    assert loads.count("riddles") == 1
    assert (runs / "main-1" / "student").is_dir()


def test_forms_of_question_have_scores_of_their_own(
    tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Riddles(images=False)
    task.test = [
        {**item, "category": "long", "form": form} for item, form in zip(task.train, ("one", "other"))
    ]
    monkeypatch.setattr("recipes.yardstick.load_task", lambda *_: task)
    file = tmp_path / "r.json"
    found = linmu(saved(tmp_path, "main"), "--out", tmp_path / "runs", "--json", file)
    assert found.exit_code == 0, found.output
    for scored in Results.read(file).rows:
        forms = [scored[f"recall form long: {form}"] for form in ("one", "other")]
        assert sum(forms) / 2 == scored["recall accuracy long"]


def test_recipes_of_one_teacher_ask_it_once(
    tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name in ("evaluate", "perplexity", "continuations"):
        measure = getattr(yardstick, name)

        @functools.wraps(measure)
        def spied(*args: Any, measure: Any = measure, **kwargs: Any) -> Any:
            asked.append(measure.__name__)
            return measure(*args, **kwargs)

        monkeypatch.setattr(yardstick, name, spied)
    paths = saved(tmp_path, "main"), saved(tmp_path, "peer-a")
    found = linmu(*paths, "--seeds", "0,1", "--out", tmp_path / "runs")
    assert found.exit_code == 0, found.output
    assert asked == ["perplexity", "continuations", "evaluate"]
    assert loads == ["toy", "riddles", "text", "recall"]


def test_pictures_have_figures_of_long_videos_and_the_teacher_of_what_is_trivial(
    tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(task: Riddles, item: Any, ids: Any) -> float:
        return {"names": 1.0, "needle 9": 0.5}[item["category"]]

    monkeypatch.setattr(Riddles, "score", seen)
    monkeypatch.setattr(Riddles, "long_videos", {"needle 9"}, raising=False)
    monkeypatch.setattr(Riddles, "trivial", {"names": 0.75, "needle 9": 0.375}, raising=False)
    make = Riddles.__init__

    def made(task: Riddles, images: bool) -> None:
        make(task, images)
        task.test = [{**item, "category": ("names", "needle 9")[i % 2]} for i, item in enumerate(task.test)]

    monkeypatch.setattr(Riddles, "__init__", made)
    file = tmp_path / "r.json"
    found = linmu(saved(tmp_path, "main"), "--out", tmp_path / "runs", "--json", file)
    assert found.exit_code == 0, found.output
    results = Results.read(file)
    teacher, student = results.rows
    figures = {"recovery_mean": 1.0, "recovery_min": 1.0, "recovery_long_video": 1.0}
    for row in (teacher, student, results.figures):
        assert {name: row[name] for name in figures} == figures
    assert teacher["above_trivial_min"] == results.figures["above_trivial_min"] == 0.125
    assert "above_trivial_min" not in student
    for heading in ("recovery long video", "above trivial min"):
        assert heading.split()[-1] in found.output


def test_the_load_of_the_gpu_is_told_by_stage(
    tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = itertools.chain([0.5, 1.0], itertools.repeat(0.25))
    monkeypatch.setattr("recipes.trainer.gpu_load", lambda device: {"gpu_busy": next(busy), "peak_gib": 1.5})
    stages = stage(name="one", steps=2, log_every=1), stage(name="two", steps=2)
    file = tmp_path / "r.json"
    found = linmu(saved(tmp_path, "main", *stages), "--out", tmp_path / "runs", "--json", file)
    assert found.exit_code == 0, found.output
    student = Results.read(file).rows[1]
    assert (student["gpu_busy one"], student["gpu_busy two"]) == (0.75, 0.25)
    assert (student["peak_gib one"], student["peak_gib two"]) == (1.5, 1.5)
    assert student["tokens_a_second one"] > 0


def test_a_run_that_fails_is_a_note_and_the_rest_go_on(tmp_path: Path, loads: list[str]) -> None:
    bad, good = saved(tmp_path, "bad", student="mmat"), saved(tmp_path, "good")
    file = tmp_path / "r.json"
    found = linmu(bad, good, "--out", tmp_path / "runs", "--json", file)
    assert found.exit_code == 1
    assert "1 of 2 runs failed" in " ".join(found.stderr.split())
    first, second = Results.read(file).rows[1:]
    error = tmp_path / "runs" / "bad-0" / "error.txt"
    assert "Did you mean 'mmate'" in first["note"]
    assert first["note"].endswith(f"({error})")
    assert "Traceback" in error.read_text()
    assert "Did you mean 'mmate'" in error.read_text()
    assert "note" not in second
    assert "ppl_ratio" not in Results.read(file).figures
    saved(tmp_path, "bad")
    assert linmu(bad, "--out", tmp_path / "runs").exit_code == 0
    assert not error.exists()


def test_debug_gives_the_error_of_a_run_at_once(tmp_path: Path, loads: list[str]) -> None:
    bad, good = saved(tmp_path, "bad", student="mmat"), saved(tmp_path, "good")
    command = ["--debug", "bench", "recovery", str(bad), str(good), "--out", str(tmp_path / "runs")]
    assert isinstance(CliRunner().invoke(app, command).exception, UnknownMixerError)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_measured_again_and_not_trained(tmp_path: Path, loads: list[str]) -> None:
    path, file = saved(tmp_path, "main", *three_stages()), tmp_path / "r.json"
    command = (path, "--scale", 0.1, "--out", tmp_path / "runs", "--json", file)
    assert linmu(*command).exit_code == 0
    first = Results.read(file)
    assert linmu(*command, "--add").exit_code == 0
    assert Results.read(file).rows == first.rows


def test_several_processes_fill_one_file(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write(file, "a", [TEACHER, row("ablate-x", 0, ppl_ratio=3.0)], add=True)
    assert Results.read(file).figures == {"ppl_ratio": 3.0}
    write(file, "b", [TEACHER, row("linmu", 1, ppl_ratio=2.0), row("linmu", 0, note="no")], add=True)
    write(file, "c", [row("linmu", 0, ppl_ratio=1.0), row("peer-y", 0, ppl_ratio=4.0)], add=True)
    results = Results.read(file)
    assert [(r["recipe"], r.get("seed")) for r in results.rows] == [
        ("the teacher", None),
        ("linmu", 0),
        ("linmu", 1),
        ("peer-y", 0),
        ("ablate-x", 0),
    ]
    assert results.figures == {"ppl_ratio": 1.5, "best_peer_ppl_ratio": 4.0}
    assert results.command == "a && b && c"
    write(file, "d", [row("peer-y", 0, ppl_ratio=5.0)], add=False)
    assert Results.read(file).command == "d"
    assert len(Results.read(file).rows) == 1


def test_the_teachers_scores_of_all_tasks_are_one_row() -> None:
    first, other = {**TEACHER, "text perplexity all": 16.0}, {**TEACHER, "pictures accuracy all": 0.5}
    assert ordered([first, row("linmu", 0), other])[0] == {**first, **other}


def test_a_failed_recipe_has_no_figures_of_another() -> None:
    rows = [row("linmu", 0, note="no"), row("peer-a", 0, ppl_ratio=4.0), row("peer-b", 0, ppl_ratio=3.0)]
    assert figures(ordered(rows)) == {"best_peer_ppl_ratio": 3.0}


def test_patterns_choose_from_the_library_and_each_once() -> None:
    peers = [name for name in Recipe.names() if name.startswith("peer-")]
    assert [r.name for r in chosen([peers[-1], "peer-*"])] == [peers[-1], *peers[:-1]]
    with pytest.raises(UnknownRecipeError, match="peers-"):
        chosen(["peers-*"])


def test_scaling_multiplies_steps_and_nothing_else() -> None:
    original = recipe(stage(name="one", steps=100), stage(name="two", steps=1))
    assert [s.steps for s in scaled(original, 0.45).stages] == [45, 1]
    assert scaled(original) == original
    assert scaled(original, seed=3) == original.model_copy(update={"seed": 3})


def test_minutes_are_divided_as_steps_are() -> None:
    original = recipe(stage(name="one", steps=300), stage(name="two", steps=100))
    assert [(s.minutes, s.steps) for s in scaled(original, minutes=2).stages] == [(1.5, 300), (0.5, 100)]


def test_a_row_says_how_many_steps_its_minutes_were(tmp_path: Path, loads: list[str]) -> None:
    file = tmp_path / "r.json"
    path = saved(tmp_path, "main", stage(name="one", steps=1))
    found = linmu(path, "--minutes", 0.1, "--out", tmp_path / "runs", "--json", file)
    assert found.exit_code == 0, found.output
    _, student = Results.read(file).rows
    assert student["minutes"] >= 0.1
    assert student["steps"] > 1


def test_recipes_of_the_same_name_that_differ_are_refused(tmp_path: Path) -> None:
    other = saved(tmp_path, "linmu-tiny-vlm")
    with pytest.raises(InvalidRecipeError, match="two recipes are called 'linmu-tiny-vlm'"):
        chosen(["linmu-tiny-vlm", str(other)])


def test_a_file_of_other_rows_is_not_added_to_and_nothing_runs(tmp_path: Path, loads: list[str]) -> None:
    file = tmp_path / "ops.json"
    Results("ops", {}, [{"op": "ssd"}]).write(file)
    before = file.read_bytes()
    found = linmu(saved(tmp_path, "main"), "--json", file, "--add")
    assert found.exit_code == 2
    assert "holds no recoveries: a row has no 'recipe'" in " ".join(found.stderr.split())
    assert file.read_bytes() == before
    assert not loads


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("linmu-tiny-vml",), "Did you mean 'linmu-tiny-vlm'"),
        (("linmu-tiny-vlm", "--seeds", "a"), "--seeds takes numbers"),
        (("linmu-tiny-vlm", "--scale", 0), "--scale must be positive"),
        (("linmu-tiny-vlm", "--minutes", 0), "--minutes must be positive"),
        (("linmu-tiny-vlm", "--minutes", 1, "--scale", 0.5), "without --scale"),
    ],
    ids=str,
)
def test_bad_input_exits_with_2_and_runs_nothing(
    arguments: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = linmu(*arguments)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []
