"""How often a student would say what its teacher says, along the teacher's own greedy continuations."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from recipes.data.rows import answered, greedy_answers, merge
from recipes.data.task import Task
from recipes.evaluate import EvaluationError, Group, Progress, batches, judged, spread, to_device
from recipes.losses import predicted_tokens


@dataclass(frozen=True)
class Agreement:
    """How often two models choose the same next token.

    Attributes:
        task: Name of the task whose prompts were continued.
        agreement: Fraction of the teacher's tokens that are the student's first choice too.
        tokens: How many there were.
        seconds: Wall-clock time.
        groups: The same by the item's ``"category"``; ``questions`` counts tokens. Empty if it has none.
    """

    task: str
    agreement: float
    tokens: int
    seconds: float
    groups: dict[str, Group] = field(default_factory=dict)


def agreement(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Agreement:
    """Let the teacher continue the prompts of the task's test split, and ask the student for each next token.

    The student reads what the teacher wrote, so that one token said otherwise does not count for all after it.

    Args:
        student: Any model of the teacher's vocabulary.
        teacher: Generates ``task.max_new_tokens`` tokens greedily, or up to its end token.
        task: Whose prompts.
        limit: Use so many items, spread evenly over the split. None: all.
        batch_size: Prompts at a time.
        progress: Told after each batch.

    Raises:
        EvaluationError: The split is empty, ``limit`` is not positive, or the teacher says nothing.
    """
    items = spread(task.test, limit, task.name)
    start = time.perf_counter()
    pad_id = teacher.generation_config.pad_token_id or 0  # type: ignore[union-attr]
    right: dict[str | None, int] = {}
    said: dict[str | None, int] = {}
    done = 0
    with judged(student), judged(teacher):
        for chunk in batches(items, batch_size):
            prompts = [task.prompts([item]) for item in chunk]
            answers = greedy_answers(teacher, merge(prompts, pad_id, side="left"), task.max_new_tokens)
            rows = [answered(prompt, answer) for prompt, answer in zip(prompts, answers)]
            batch = to_device(merge(rows, pad_id), student.device)
            mask = predicted_tokens(batch, "labelled")
            next_tokens = batch.pop("labels").roll(-1, dims=1)
            same = (student(**batch, use_cache=False).logits.argmax(-1) == next_tokens) & mask
            for item, hits, tokens in zip(chunk, same.sum(1).tolist(), mask.sum(1).tolist()):
                name = item.get("category")
                right[name] = right.get(name, 0) + hits
                said[name] = said.get(name, 0) + tokens
            done += len(chunk)
            if progress is not None:
                progress(done, len(items))
    tokens = sum(said.values())
    if not tokens:
        raise EvaluationError(f"{task.name}: the teacher continued none of {len(items)} prompts.")
    groups = {n: Group(right[n] / said[n], said[n]) for n in said if n is not None and said[n]}
    return Agreement(task.name, sum(right.values()) / tokens, tokens, time.perf_counter() - start, groups)
