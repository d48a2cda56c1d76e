"""A stage of minutes ends with its time, at whatever step; its learning rate follows the time."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.distill import distill
from recipes.minutes import Minutes
from recipes.plan import Optimizer
from tests.recipes import toys
from tests.recipes.toys import QUIET, Riddles, recipe, stage


class Clock:
    """So many seconds pass between two looks."""

    def __init__(self, step: float = 1.0) -> None:
        self.ticks = itertools.count(100.0, step)

    def monotonic(self) -> float:
        return next(self.ticks)


def rates(schedule: str, warmup: float, earlier: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The factors on the learning rate of a training of ten seconds, one a step, and when it ends."""
    monkeypatch.setattr("recipes.minutes.time", Clock())
    minutes = Minutes(10 / 60, Optimizer(learning_rate=1.0, warmup=warmup, schedule=schedule))
    scheduler = SimpleNamespace(lr_lambdas=[None])
    state = SimpleNamespace(log_history=[{"seconds": earlier}, {}])
    control = SimpleNamespace(should_training_stop=False)
    told: dict[str, Any] = {"args": None, "state": state, "control": control}
    minutes.on_train_begin(**told, lr_scheduler=scheduler)
    seen = [scheduler.lr_lambdas[0](0)]
    while not control.should_training_stop:
        minutes.on_step_begin(**told)
        minutes.on_pre_optimizer_step(**told)
        seen.append(scheduler.lr_lambdas[0](len(seen)))
        minutes.on_step_end(**told)
    return seen


def test_the_rate_rises_and_falls_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = rates("linear", 0.2, 0.0, monkeypatch)
    assert linear == pytest.approx([0, 0.5, 1, *(1 - n / 8 for n in range(1, 9))])
    assert rates("constant", 0.2, 0.0, monkeypatch) == pytest.approx([0, 0.5, *[1] * 9])
    cosine = rates("cosine", 0.0, 0.0, monkeypatch)
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0)


def test_what_was_spent_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rates("linear", 0.0, 0.0, monkeypatch)
    assert rates("linear", 0.0, 6.0, monkeypatch) == pytest.approx(whole[6:])


def test_a_stage_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.minutes.time", Clock(0.5))
    plan = recipe(stage(name="timed", steps=1, minutes=2 / 60), stage(name="counted", steps=2))
    done = distill(plan, tmp_path, teacher=toys.teacher(), task=Riddles(images=False), callbacks=QUIET)
    steps = {entry["stage"]: entry["step"] for entry in done.history}
    assert steps == {"timed": 4, "counted": 2}
