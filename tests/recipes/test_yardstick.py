"""A yardstick asks a teacher once; what its students are told is what a fresh measurement says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import bridges
from recipes import yardstick as yardsticks
from recipes.data.task import Task
from recipes.plan import Judge, TaskSpec
from recipes.report import layer_errors, report
from recipes.yardstick import Yardstick
from tests.recipes import toys
from tests.recipes.toys import Riddles, recipe, stage

MEASURES = ["accuracy", "perplexity", "agreement"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the datasets that were loaded."""
    loaded: list[str] = []

    def load_task(spec: Any, config: Any, tokenizer: Any) -> Task:
        loaded.append(spec.task)
        return Riddles(images=False)

    monkeypatch.setattr(yardsticks, "load_task", load_task)
    return loaded


def students(model: Any) -> list[Any]:
    made = []
    for seed in range(2):
        student = copy.deepcopy(model)
        bridges.replace_attention(student, "mmate", text_window=4, chunk_size=8)
        torch.manual_seed(seed)
        for parameter in student.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        made.append(student)
    return made


def calls_of(model: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_second_student_does_not_ask_the_teacher_again(loads: list[str]) -> None:
    teacher = toys.teacher()
    first, second = students(teacher.model)
    calls, yardstick = calls_of(teacher.model), Yardstick(teacher)
    plan = recipe(stage(), judged_by=[{"task": "a", "measures": MEASURES}, {"task": "b", "limit": 2}])
    report(plan, first, yardstick)
    asked = len(calls)
    assert loads == ["a", "b"]
    calls.clear()
    layer_errors(second, teacher.model, Riddles(images=False))
    for_layers = len(calls)
    assert for_layers < asked
    calls.clear()
    found = report(plan, second, yardstick)
    assert len(calls) == for_layers
    assert loads == ["a", "b"]
    assert found == report(plan, second, teacher)
    assert found != report(plan, first, teacher)


def test_a_dataset_is_the_same_for_training_and_for_every_judge_of_its_options(loads: list[str]) -> None:
    yardstick = Yardstick(toys.teacher())
    task = yardstick.task(TaskSpec(task="a", options={"size": 1}, workers=2))
    assert yardstick.task(Judge(task="a", options={"size": 1}, limit=3, name="other")) is task
    assert yardstick.task(Judge(task="a")) is not task
    assert loads == ["a", "a"]


@pytest.mark.parametrize("measure", ["accuracy", "perplexity", "continuations"])
def test_a_score_is_that_of_the_items_asked_for(measure: str, loads: list[str]) -> None:
    yardstick = Yardstick(toys.teacher())
    score = getattr(yardstick, measure)
    whole = score(Judge(task="a"))
    assert score(Judge(task="a", name="other", measures=MEASURES)) is whole
    assert score(Judge(task="a", workers=1)) is whole
    assert score(Judge(task="a", limit=1)) is not whole
    assert score(Judge(task="b")) is not whole
