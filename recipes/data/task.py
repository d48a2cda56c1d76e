"""What a dataset must offer to be distilled on and evaluated by generation: the `Task` protocol."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

Item = Mapping[str, Any]
Batch = dict[str, Tensor]

IGNORED = -100
"""The label that the loss of every transformers model skips."""


class TaskError(Exception):
    """Base of all errors of the datasets."""


class DatasetNotInstalled(TaskError, ImportError):
    """The package that holds the data is missing."""


class UnsupportedModel(TaskError, TypeError):
    """The model cannot read what the task shows it."""


class NoVisionTokens(TaskError, ValueError):
    """An image is too small to give a single vision token."""


class EmptyBatch(TaskError, ValueError):
    """A batch was asked for without an item."""


class VideoTooShort(TaskError, ValueError):
    """A video is too short to give a single temporal patch."""


@runtime_checkable
class Task(Protocol):
    """Items to train on, items to be judged by, and the way between an item and the model's tensors.

    `train` and `test` are map-style sequences of dicts, so they go to a `DataLoader` or a `Trainer` as they
    are, with `collate` as the collator. A batch holds exactly the keyword arguments of the model's forward.
    Where rows differ much in length, `train` may have an attribute `sizes`, about how many tokens each item
    has; rows of like size are then batched together. A task may also have an attribute `trivial`, category → the
    score that answers without a look would have; reports show it. A task that shows pictures has an attribute
    `long_videos`, those of its categories that are long videos; reports sum such tasks up together. Test items may
    have a `"category"`, and a `"form"` of question within it; accuracy is given for each.

    Attributes:
        name: Short name for tables and file names.
        max_new_tokens: Length of the longest answer, its end token included.
    """

    name: str
    max_new_tokens: int

    @property
    def train(self) -> Sequence[Item]:
        """Items of the training split."""
        ...

    @property
    def test(self) -> Sequence[Item]:
        """Items of the split that accuracy is reported on."""
        ...

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch: right-padded `input_ids`, `attention_mask` and `labels` [B, N], and the model's own.

        `labels` is -100 except on the answer and its end token.
        """
        ...

    def prompts(self, items: Sequence[Item]) -> Batch:
        """Inputs of `generate()`: left-padded, without answers and without labels."""
        ...

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """Judge newly generated ids [N], the prompt cut off: 1.0 if they are the item's answer, down to 0.0."""
        ...


class MadeItems(Sequence[Item]):
    """A split whose items are made when they are asked for."""

    @abstractmethod
    def item(self, place: int) -> Item:
        """Make the item at a place from 0 up."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        return [self.item(place) for place in places] if isinstance(places, range) else self.item(places)


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """Stacks rows of unequal length into one int64 tensor [B, N], filled with `value` on one side.

    Raises:
        EmptyBatch: There is no row.
    """
    if not rows:
        raise EmptyBatch("cannot make a batch of no items: pass at least one")
    length = max(map(len, rows))
    batch = torch.full((len(rows), length), value, dtype=torch.long)
    for row, ids in zip(batch, rows):
        span = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        row[span] = torch.tensor(ids, dtype=torch.long)
    return batch


def unmasked(batch: Batch) -> Batch:
    """Return a right-padded batch without its attention mask, which says nothing that causality does not.

    So attention runs as torch's causal kernel, which leaves out half of the work. A model that looks ahead of text,
    such as PaliGemma, is told where by ``token_type_ids``; such a batch keeps its mask.
    """
    if "token_type_ids" in batch:
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"}
