"""The rows a stage trains on: items with their own answers, with the teacher's, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from recipes.checkpoint import read_tensors, write_tensors
from recipes.data.task import IGNORED, Batch, Item, Task, TaskError
from recipes.errors import CheckpointError
from recipes.objective import FROM_TEACHER

Row = tuple[Item, Tensor | None]
"""An item, and the answer that the teacher generated (ids [N]), or None for its own."""


class VisionCut(TaskError, ValueError):
    """A row is cut in the middle of its image or video."""


class NotRightPadded(TaskError, ValueError):
    """A training batch has padding before a token."""


class Rows(torch.utils.data.Dataset):
    """Rows of a stage; where both kinds are wanted, every other row has a teacher's answer.

    Args:
        items: Training items.
        answers: Index of an item → the teacher's answer. None: the stage does not use any.
        own: Whether rows with the items' own answers take part.
    """

    def __init__(self, items: Sequence[Item], answers: Mapping[int, Tensor] | None, own: bool) -> None:
        self.items, self.own = items, own or answers is None
        self.answers = [] if answers is None else sorted(answers.items())

    def __len__(self) -> int:
        if not self.answers:
            return len(self.items)
        return 2 * max(len(self.items), len(self.answers)) if self.own else len(self.answers)

    def __getitem__(self, index: int) -> Row:
        item, answer = self._place(index)
        return self.items[item], answer

    @property
    def sizes(self) -> list[int] | None:
        """About how many tokens each row has, so that like can be batched with like; None where nobody says."""
        sizes = getattr(self.items, "sizes", None)
        return None if sizes is None else [sizes[self._place(index)[0]] for index in range(len(self))]

    def _place(self, index: int) -> tuple[int, Tensor | None]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self.answers:
            return index, None
        if self.own:
            index, from_teacher = divmod(index, 2)
            if not from_teacher:
                return index % len(self.items), None
        return self.answers[index % len(self.answers)]


class Collator:
    """Makes a right-padded batch of rows.

    Args:
        task: The dataset.
        pad_id: Token id that fills up short rows.
        max_length: Longer batches are cut at their end.
    """

    def __init__(self, task: Task, pad_id: int, max_length: int | None = None) -> None:
        self.task, self.pad_id, self.max_length = task, pad_id, max_length

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate.

        Raises:
            VisionCut: ``max_length`` is shorter than the vision tokens of a row.
            NotRightPadded: The task pads training rows on the left.
        """
        if all(answer is None for _, answer in rows):
            batch = self.task.collate([item for item, _ in rows])
        else:
            batch = merge([self._single(item, answer) for item, answer in rows], self.pad_id)
            batch[FROM_TEACHER] = torch.tensor([answer is not None for _, answer in rows])
        mask = batch.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise NotRightPadded(
                f"the dataset {self.task.name!r} gives training batches with padding before a token; pad them on the "
                "right."
            )
        return batch if self.max_length is None else cut(batch, self.max_length)

    def _single(self, item: Item, answer: Tensor | None) -> Batch:
        return self.task.collate([item]) if answer is None else answered(self.task.prompts([item]), answer)


def answered(prompt: Batch, answer: Tensor) -> Batch:
    """Put an answer [N] behind a prompt of one row; its tokens are labelled."""
    added = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    row = dict(prompt)
    for key in _token_keys(prompt):
        extra = added.get(key, torch.zeros_like(answer)).to(prompt[key].dtype)
        row[key] = torch.cat([prompt[key], extra[None]], dim=1)
    row["labels"] = torch.cat([torch.full_like(prompt["input_ids"], IGNORED), answer[None]], dim=1)
    return row


def merge(rows: Sequence[Batch], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Join batches of one row each: what has a value a token is padded on one side, the rest put end to end.

    Rows may differ in what else they have: one of an image, another of a video. Marks of vision that a row of text
    does not have are 0.
    """
    length = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": pad_id, "labels": IGNORED}
    per_token = set().union(*map(_token_keys, rows))
    batch = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key in per_token:
            given = [row.get(key, torch.zeros_like(row["input_ids"])) for row in rows]
            gaps = [(length - part.shape[1], 0)[:: -1 if side == "right" else 1] for part in given]
            parts = [F.pad(part, gap, value=fill.get(key, 0)) for part, gap in zip(given, gaps)]
        else:
            parts = [row[key] for row in rows if key in row]
        batch[key] = torch.cat(parts)
    return batch


def cut(batch: Batch, length: int) -> Batch:
    """Cut the tokens of a batch at ``length``.

    Raises:
        VisionCut: Vision tokens would be cut off.
    """
    if batch["input_ids"].shape[1] <= length:
        return batch
    kinds = batch.get("mm_token_type_ids")
    if kinds is not None and kinds[:, length:].any():
        tokens = int((kinds != 0).sum(1).max())
        raise VisionCut(
            f"max_length {length} cuts through an image or video: a row has {tokens} vision tokens; raise "
            "max_length or leave it out"
        )
    per_token = _token_keys(batch)
    return {key: value[:, :length] if key in per_token else value for key, value in batch.items()}


def _token_keys(batch: Batch) -> set[str]:
    return {key for key, value in batch.items() if value.shape == batch["input_ids"].shape}


def teacher_answers(
    teacher: PreTrainedModel, task: Task, samples: int, path: Path, *, seed: int, batch_size: int
) -> dict[int, Tensor]:
    """Return the teacher's greedy answers to training items, made once and then read from ``path``.

    Args:
        teacher: The teacher.
        task: The dataset.
        samples: Items to answer, drawn without replacement; all, if there are fewer.
        path: Safetensors file; one that is there is used again.
        seed: Of the draw.
        batch_size: Prompts at a time.

    Returns:
        Index of an item → ids [N] of its answer, end token included.

    Raises:
        CheckpointError: ``path`` is damaged, holds answers to other items, or cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train), generator=generator)[:samples]
    if not path.exists():
        width = task.max_new_tokens
        answers: list[Tensor] = []
        for part in chosen.split(batch_size):
            prompts = task.prompts([task.train[i] for i in part.tolist()])
            answers += greedy_answers(teacher, prompts, width)
        padded = [F.pad(answer, (0, width - len(answer)), value=IGNORED) for answer in answers]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"items": chosen, "answers": torch.stack(padded)})
    stored = read_tensors(path)
    if not torch.equal(stored["items"], chosen):
        raise CheckpointError(
            f"{path} holds answers to {len(stored['items'])} items, not to the {len(chosen)} that this stage draws: it "
            f"was made with another dataset, seed or number of samples; delete {path.parent} to do this stage again."
        )
    return {int(i): ids[ids != IGNORED] for i, ids in zip(stored["items"], stored["answers"])}


def greedy_answers(model: PreTrainedModel, prompts: Batch, length: int) -> list[Tensor]:
    """Return what a model says to each left-padded prompt: ids [N], the end token included, N at most ``length``."""
    return answers_to(model, prompts, length, do_sample=False)


def answers_to(model: PreTrainedModel, prompts: Batch, length: int, **how: Any) -> list[Tensor]:
    """Return the same as :func:`greedy_answers`, with tokens chosen as options of ``generate()`` say."""
    inputs: dict[str, Any] = {key: value.to(model.device) for key, value in prompts.items()}
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=length, num_beams=1, **how)  # type: ignore[operator]
    ids = ids[:, inputs["input_ids"].shape[1] :].cpu()
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ended = torch.isin(ids, torch.tensor([] if ends is None else ends).long()).cumsum(1)
    after_end = F.pad(ended, (1, 0))[:, :-1] > 0
    return [row[~over] for row, over in zip(ids, after_end)]
