"""What students are measured against: a teacher, the datasets made for it, and its own scores on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from recipes.agreement import Continuations, continuations
from recipes.data import load_task
from recipes.data.task import Task
from recipes.evaluate import Evaluation, Perplexity, evaluate, perplexity
from recipes.plan import Judge, TaskSpec
from recipes.teachers import Teacher

Score = TypeVar("Score")


class Yardstick:
    """A teacher that several students are laid beside: each dataset is loaded, and each score of it measured, once.

    What a judge is called does not matter to a score; its items and their batches do. Items are kept as the dataset
    gives them, without the batches made of them, and what the teacher said as ids, so memory stays small.

    Args:
        teacher: On the device where it is to be measured; not changed between two scores.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._tasks: dict[str, Task] = {}
        self._scores: dict[tuple[str, str], Any] = {}

    def task(self, spec: TaskSpec) -> Task:
        """Return a dataset, made for the teacher.

        Raises:
            recipes.data.task.TaskError: The data is missing or does not suit the teacher.
        """
        key = spec.model_dump_json(include={"task", "options"})
        if key not in self._tasks:
            self._tasks[key] = load_task(spec, self.teacher.model.config, self.teacher.tokenizer)
        return self._tasks[key]

    def accuracy(self, judge: Judge) -> Evaluation:
        """Return how well the teacher answers; see :func:`recipes.evaluate.evaluate`."""
        return self._once(evaluate, judge, "accuracy")

    def perplexity(self, judge: Judge) -> Perplexity:
        """Return how likely the teacher finds the labelled tokens; see :func:`recipes.evaluate.perplexity`."""
        return self._once(perplexity, judge, "perplexity")

    def continuations(self, judge: Judge) -> Continuations:
        """Return what the teacher says to the prompts; see :func:`recipes.agreement.continuations`."""
        return self._once(continuations, judge, "agreement")

    def _once(self, take: Callable[..., Score], judge: Judge, measure: str) -> Score:
        key = (measure, judge.model_dump_json(exclude={"name", "measures", "workers"}))
        if key not in self._scores:
            self._scores[key] = take(self.teacher.model, self.task(judge), **judge.arguments(measure))
        return self._scores[key]
