"""A finished run loads as it was left; what is no finished run of this teacher is refused, and why is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from recipes import finished_run
from recipes.distill import Distilled, distill
from recipes.errors import CheckpointError, RunError
from recipes.finished_run import FinishedRun
from recipes.teachers import Teacher
from tests.recipes.toys import QUIET, Kill, Riddles, recipe, stage
from tests.recipes.toys import teacher as make_teacher

PLAN = recipe(stage(), stage(name="two"))


def run(folder: Path, teacher: Teacher, **options: object) -> Distilled:
    return distill(
        PLAN, folder, teacher=teacher, task=Riddles(images=False), **{"callbacks": QUIET, **options}
    )


def in_dtype(dtype: torch.dtype) -> Teacher:
    made = make_teacher()
    made.model.to(dtype)
    return made


@pytest.fixture(autouse=True)
def known_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_run, "load_teacher", lambda spec: in_dtype(getattr(torch, spec.dtype)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, make_teacher())
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_loads_as_it_was_left(dtype: str, tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"teacher": PLAN.teacher.model_copy(update={"dtype": dtype})})
    task, teacher = Riddles(images=False), in_dtype(getattr(torch, dtype))
    done = distill(plan, tmp_path, teacher=teacher, task=task, callbacks=QUIET)
    loaded = FinishedRun.load(tmp_path, "cpu")
    assert loaded.recipe == plan
    assert loaded.history == done.history
    expected = dict(done.student.named_parameters())
    found = dict(loaded.student.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name
    assert not loaded.student.training
    assert not loaded.teacher.model.training


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: there is no .*run\.json.*linmu distill"):
        FinishedRun.load(tmp_path / "nothing")
    (tmp_path / "run.json").write_text('{"figures": {}}')
    with pytest.raises(RunError, match="needs a recipe and a teacher"):
        FinishedRun.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        FinishedRun.load(tmp_path)


def test_a_run_that_was_killed_is_refused_with_what_is_left_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make_teacher(), callbacks=[Kill("two", 1)])
    with pytest.raises(RunError, match=r"not finished \(stages still to do: two\).*linmu distill"):
        FinishedRun.load(tmp_path)


@pytest.mark.parametrize("name", ["student", "history.json"])
def test_a_run_killed_while_it_saved_is_refused(name: str, copied: Path) -> None:
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RunError, match="student was not saved"):
        FinishedRun.load(copied)


def test_a_teacher_that_has_become_another_is_refused(copied: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    record["teacher"]["sha256"] = "0" * 64
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="another teacher than 'toy' is now"):
        FinishedRun.load(copied)
