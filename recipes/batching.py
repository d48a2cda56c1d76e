"""Batches of rows of like size, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from recipes.data.task import Task, TaskError
from recipes.plan import Stage


def check_sizes(stage: Stage, task: Task) -> None:
    """Make sure that what bounds a stage's batches is known.

    Raises:
        TaskError: Tokens bound them, and the dataset does not know the sizes of its rows.
    """
    if stage.batch_tokens is not None and not hasattr(task.train, "sizes"):
        raise TaskError(
            f"stage {stage.name!r} bounds its batches by tokens, but the dataset {task.name!r} does not know the sizes "
            "of its rows; leave out batch_tokens."
        )


def bounded(sizes: Iterable[int], rows: int, tokens: int | None) -> list[int]:
    """Cut rows, in their order, into batches.

    Args:
        sizes: Tokens of each row.
        rows: Most rows of a batch.
        tokens: Most tokens of a batch, padding included; a single row may have more. None: any number.

    Returns:
        How many rows each batch has.
    """
    counts: list[int] = []
    count = longest = 0
    for size in sizes:
        longest = max(longest, size)
        if count == rows or (count and tokens is not None and (count + 1) * longest > tokens):
            counts.append(count)
            count, longest = 0, size
        count += 1
    return [*counts, count] if count else counts


class LikeSizes(Sampler[list[int]]):
    """Draws batches of rows of like size, each row once, the batches in random order; another order each epoch.

    To start a step's kernels takes as long for short rows as for long ones. Bounded by tokens rather than by rows, a
    batch of short rows has more of them, and keeps a GPU as busy as one of long rows.

    Args:
        sizes: Tokens of each row.
        rows: Most rows of a batch.
        tokens: Most tokens of a batch, padding included, as far as sizes are right; a single row may have more.
            None: any number.
        processes: How many of them take turns with the batches. Of what they draw at the same time all have the
            same rows in number, of like size; up to one row less than there are processes is left out.
        seed: Of the draw.
    """

    def __init__(
        self, sizes: Sequence[int], rows: int, tokens: int | None = None, *, processes: int = 1, seed: int = 0
    ) -> None:
        self.sizes, self.seed, self.epoch, self.processes = torch.tensor(sizes), seed, 0, processes
        self.counts = bounded(self.sizes.sort().values[processes - 1 :: processes].tolist(), rows, tokens)

    def __len__(self) -> int:
        return len(self.counts) * self.processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls it."""
        self.epoch = epoch

    @property
    def sampler(self) -> LikeSizes:
        """Itself: where accelerate looks for ``set_epoch``, when it has wrapped the batches of several processes."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randperm(len(self.sizes), generator=generator)
        by_size = drawn[self.sizes[drawn].argsort(stable=True)]
        together = by_size[: self.processes * sum(self.counts)].split(
            [self.processes * n for n in self.counts]
        )
        for number in torch.randperm(len(together), generator=generator).tolist():
            yield from together[number].view(self.processes, -1).tolist()
