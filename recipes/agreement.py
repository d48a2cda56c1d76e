"""How often a student would say what its teacher says, along the teacher's own greedy continuations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from recipes.data.rows import answered, greedy_answers, merge
from recipes.data.task import IGNORED, Item, Task
from recipes.evaluate import EvaluationError, Group, Progress, batches, judged, predictions, spread


@dataclass(frozen=True)
class Continuations:
    """What a teacher says to the prompts of a task's test split.

    Attributes:
        task: Whose prompts.
        items: Those of the split that were continued.
        answers: Ids [N] of each continuation, on the CPU.
    """

    task: Task
    items: Sequence[Item]
    answers: Sequence[Tensor]


@dataclass(frozen=True)
class Agreement:
    """How often two models choose the same next token.

    Attributes:
        task: Name of the task whose prompts were continued.
        agreement: Fraction of the teacher's tokens that are the student's first choice too.
        tokens: How many there were.
        seconds: Wall-clock time, the teacher's continuations not included.
        groups: The same by the item's ``"category"``; ``questions`` counts tokens. Empty if it has none.
    """

    task: str
    agreement: float
    tokens: int
    seconds: float
    groups: dict[str, Group] = field(default_factory=dict)


def continuations(
    teacher: PreTrainedModel, task: Task, *, limit: int | None = None, batch_size: int = 8
) -> Continuations:
    """Let a teacher continue the prompts of the task's test split.

    Args:
        teacher: Generates ``task.max_new_tokens`` tokens greedily, or up to its end token.
        task: Whose prompts.
        limit: Use so many items, spread evenly over the split. None: all.
        batch_size: Left-padded prompts at a time.

    Raises:
        EvaluationError: The split is empty, ``limit`` is not positive, or the teacher says nothing.
    """
    items = spread(task.test, limit, task.name)
    answers: list[Tensor] = []
    with judged(teacher):
        for chunk in batches(items, batch_size):
            answers += greedy_answers(teacher, task.prompts(chunk), task.max_new_tokens)
    if not any(map(len, answers)):
        raise EvaluationError(f"{task.name}: the teacher continued none of {len(items)} prompts.")
    return Continuations(task, items, answers)


def agreement(
    student: PreTrainedModel,
    continued: Continuations,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Agreement:
    """Ask a student for each next token of what its teacher said.

    The student reads what the teacher wrote, so that one token said otherwise does not count for all after it.

    Args:
        student: Any model of the teacher's vocabulary.
        continued: What its teacher said, from :func:`continuations`.
        batch_size: Prompts at a time.
        progress: Told after each batch.
    """
    start = time.perf_counter()
    task, pairs = continued.task, list(zip(continued.items, continued.answers))
    pad_id = student.generation_config.pad_token_id or 0  # type: ignore[union-attr]
    right: dict[str | None, int] = {}
    said: dict[str | None, int] = {}
    done = 0
    with judged(student):
        for chunk in batches(pairs, batch_size):
            rows = [answered(task.prompts([item]), answer) for item, answer in chunk]
            logits, wanted = predictions(student, merge(rows, pad_id))
            hits, tokens = (logits.argmax(-1) == wanted).sum(1), (wanted != IGNORED).sum(1)
            for (item, _), own_hits, own_tokens in zip(chunk, hits.tolist(), tokens.tolist()):
                name = item.get("category")
                right[name] = right.get(name, 0) + own_hits
                said[name] = said.get(name, 0) + own_tokens
            done += len(chunk)
            if progress is not None:
                progress(done, len(pairs))
    total = sum(said.values())
    groups = {n: Group(right[n] / said[n], said[n]) for n in said if n is not None and said[n]}
    return Agreement(task.name, sum(right.values()) / total, total, time.perf_counter() - start, groups)
