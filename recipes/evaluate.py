"""Accuracy by greedy generation, the same code for teacher and student, and perplexity beside it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from bridges.modes import evaluating
from recipes.batching import bounded
from recipes.data.task import IGNORED, Batch, Item, Task
from recipes.errors import RecipeError
from recipes.losses import predicted_tokens

One = TypeVar("One")
Name = TypeVar("Name")
Progress = Callable[[int, int], None]
"""Told (done, total) after each batch."""


class EvaluationError(RecipeError, ValueError):
    """There is nothing to evaluate, or what came out is no number."""


@dataclass(frozen=True)
class Group:
    """The part of an evaluation with one category, one right answer, or one form of question.

    Attributes:
        accuracy: Fraction of its questions that were answered rightly.
        questions: How many there were.
    """

    accuracy: float
    questions: int


@dataclass(frozen=True)
class Evaluation:
    """How well a model answers.

    Attributes:
        task: Name of the task.
        accuracy: Mean score, a fraction.
        questions: Questions asked.
        seconds: Wall-clock time, data preparation included.
        groups: Accuracy by the item's ``"category"``, or else its ``"answer"``; empty if it has neither.
        forms: Accuracy by group and the item's ``"form"``, as (group, form); empty if it has none.
    """

    task: str
    accuracy: float
    questions: int
    seconds: float
    groups: dict[str, Group] = field(default_factory=dict)
    forms: dict[tuple[str, str], Group] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a group, the largest first."""
        ordered = sorted(self.groups.items(), key=lambda pair: -pair[1].questions)
        return [{"group": name, "accuracy": g.accuracy, "questions": g.questions} for name, g in ordered]


@dataclass(frozen=True)
class PerplexityGroup:
    """The part of a perplexity with one category.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of its tokens.
        tokens: Labelled tokens of it.
    """

    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Perplexity:
    """How likely a model finds the labelled tokens of a task.

    Secondary by design: log-likelihood alone flatters converted models, whose generation can fail at the
    same perplexity (arXiv 2603.26556).

    Attributes:
        task: Name of the task.
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: Labelled tokens that it is the mean over.
        seconds: Wall-clock time.
        groups: Perplexity by the item's ``"category"``; empty if it has none.
    """

    task: str
    perplexity: float
    tokens: int
    seconds: float
    groups: dict[str, PerplexityGroup] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row a group, in the order of the items."""
        return [
            {"group": name, "perplexity": g.perplexity, "tokens": g.tokens} for name, g in self.groups.items()
        ]


def evaluate(
    model: PreTrainedModel,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 128,
    batch_tokens: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask the questions of the task's test split and score the greedy answers.

    Args:
        model: Any model with ``generate()``; its mode (train or eval) is as before afterwards.
        task: What to ask and how to score it.
        limit: Ask so many questions, spread evenly over the split. None: all.
        batch_size: Left-padded prompts a batch.
        batch_tokens: Most tokens of a batch, padding included, where the split knows the ``sizes`` of its items; one
            prompt may have more. None: any number.
        workers: Processes that make the prompts while the model answers; 0 makes them in this one.
        progress: Told after each batch.

    Raises:
        EvaluationError: The split is empty or ``limit`` is not positive.
    """
    items = spread(task.test, limit, task.name)
    sizes = None if batch_tokens is None else getattr(task.test, "sizes", None)
    sizes = [0] * len(items) if sizes is None else spread(sizes, limit, task.name)
    remaining = iter(items)
    chunks = [list(islice(remaining, count)) for count in bounded(sizes, batch_size, batch_tokens)]
    prompts: DataLoader[Batch] = DataLoader(
        chunks,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=task.prompts,
        num_workers=workers,
    )
    start = time.perf_counter()
    scores: list[float] = []
    with judged(model):
        for chunk, batch in zip(chunks, prompts):
            inputs = to_device(batch, model.device)
            outputs = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=task.max_new_tokens, do_sample=False, num_beams=1
            )
            answers = outputs[:, inputs["input_ids"].shape[1] :].cpu()
            scores += [float(task.score(item, answer)) for item, answer in zip(chunk, answers)]
            if progress is not None:
                progress(len(scores), len(items))
    by_group: dict[str, list[float]] = {}
    by_form: dict[tuple[str, str], list[float]] = {}
    for item, score in zip(items, scores):
        if (name := item.get("category", item.get("answer"))) is not None:
            by_group.setdefault(str(name), []).append(score)
            if (form := item.get("form")) is not None:
                by_form.setdefault((str(name), str(form)), []).append(score)
    return Evaluation(
        task=task.name,
        accuracy=_mean(scores),
        questions=len(scores),
        seconds=time.perf_counter() - start,
        groups=_grouped(by_group),
        forms=_grouped(by_form),
    )


def perplexity(
    model: PreTrainedModel,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of the labelled tokens of the task's test split.

    Args:
        model: Any model whose forward takes ``logits_to_keep``.
        task: Its ``collate`` makes the batches, each of one category.
        limit: Use so many items, spread evenly over the split. None: all.
        batch_size: Items a batch.
        progress: Told after each batch.

    Raises:
        EvaluationError: The split is empty, has no labelled token, or the loss is not a number.
    """
    items = spread(task.test, limit, task.name)
    start = time.perf_counter()
    by_group: dict[str | None, list[Item]] = {}
    for item in items:
        by_group.setdefault(item.get("category"), []).append(item)
    sums: dict[str | None, float] = {}
    tokens: dict[str | None, int] = {}
    done = 0
    with judged(model):
        for name, members in by_group.items():
            losses: list[Tensor] = []  # read from the device when all of them are under way
            labels: list[Tensor] = []
            for chunk in batches(members, batch_size):
                logits, wanted = predictions(model, task.collate(chunk))
                losses += [
                    F.cross_entropy(row.float(), ids, ignore_index=IGNORED, reduction="sum")
                    for row, ids in zip(logits, wanted)
                ]
                labels.append((wanted != IGNORED).sum())
                done += len(chunk)
                if progress is not None:
                    progress(done, len(items))
            sums[name], tokens[name] = math.fsum(torch.stack(losses).tolist()), int(sum(labels))
    total, count = sum(sums.values()), sum(tokens.values())
    if not count or not math.isfinite(total):
        raise EvaluationError(f"{task.name}: the loss of {count} labelled tokens is {total}; no perplexity.")
    try:
        groups = {
            name: PerplexityGroup(math.exp(sums[name] / tokens[name]), tokens[name])
            for name in by_group
            if name is not None and tokens[name]
        }
        whole = math.exp(total / count)
    except OverflowError as error:
        raise EvaluationError(
            f"{task.name}: the loss is {total / count:g} a token, of which no number is the exponential; the model "
            "has diverged."
        ) from error
    return Perplexity(task.name, whole, count, time.perf_counter() - start, groups)


def predictions(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Let a model predict the labelled tokens of a batch.

    Logits are made only where the next token of some row is labelled.

    Args:
        model: Its forward takes ``logits_to_keep``.
        batch: On any device, with ``labels`` [B, N].

    Returns:
        Logits [B, M, V] of the model's dtype, and the ids [B, M] that should come, -100 where none is labelled.
    """
    mask = predicted_tokens(batch, "labelled")
    places = mask.any(0).nonzero()[:, 0]
    wanted = batch["labels"].roll(-1, dims=1).masked_fill(~mask, IGNORED)[:, places]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    keep = places.to(model.device)
    logits = model(**to_device(inputs, model.device), use_cache=False, logits_to_keep=keep).logits
    return logits, wanted.to(model.device)


def spread(items: Sequence[One], limit: int | None, name: str) -> list[One]:
    """Every k-th item, so that a part of a sorted split stands for the whole."""
    count = len(items) if limit is None else min(limit, len(items))
    if count < 1:
        raise EvaluationError(
            f"{name}: no question to ask; the test split has {len(items)} items and limit is {limit}."
        )
    return [items[i * len(items) // count] for i in range(count)]


def batches(items: Sequence[One], size: int) -> Iterator[Sequence[One]]:
    """Cut items into batches."""
    return (items[start : start + size] for start in range(0, len(items), size))


@contextlib.contextmanager
def judged(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients inside the block."""
    with evaluating(model), torch.no_grad():  # what a model keeps of inference mode could not train later
        yield


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move a batch."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _grouped(scores: Mapping[Name, Sequence[float]]) -> dict[Name, Group]:
    return {name: Group(_mean(values), len(values)) for name, values in scores.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
