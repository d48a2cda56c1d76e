"""Several datasets as one, each with a share of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recipes.data.rows import merge
from recipes.data.task import Batch, Item, MadeItems, Task, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class BadMix(TaskError, ValueError):
    """There is nothing to mix, or a share is not positive."""


class Mixed(MadeItems):
    """Training items of several splits, each as often as its share says, evenly spread.

    It is as long as it takes until the split that lasts longest at its share is through once; the others begin again.
    """

    def __init__(self, splits: Mapping[str, Sequence[Item]], shares: Mapping[str, float]) -> None:
        total = sum(shares[name] for name in splits)
        self.splits = splits
        self.shares = {name: shares[name] / total for name in splits}
        rows = max(len(split) / self.shares[name] for name, split in splits.items())
        # Whoever is furthest behind its share is next.
        given = dict.fromkeys(splits, 0)
        self.order: list[tuple[str, int]] = []
        for row in range(1, round(rows) + 1):
            name = max(splits, key=lambda name: self.shares[name] * row - given[name])
            self.order.append((name, given[name] % len(splits[name])))
            given[name] += 1

    def __len__(self) -> int:
        return len(self.order)

    @property
    def sizes(self) -> list[int]:
        """About how many tokens each row has.

        Raises:
            AttributeError: A split does not say so.
        """
        known: dict[str, list[int]] = {name: split.sizes for name, split in self.splits.items()}  # type: ignore[attr-defined]
        return [known[name][own] for name, own in self.order]

    def item(self, place: int) -> Item:
        """The row at a place."""
        name, own = self.order[place]
        return {"task": name, "item": self.splits[name][own]}


class Mix:
    """A `Task` made of others.

    Items are ``{"task": name, "item": the task's own, "category"}``; the test split is that of each task in turn,
    grouped as the task groups it.

    Args:
        config: The model's config.
        tokenizer: The model's tokenizer.
        tasks: Name of a dataset → its options.
        shares: Name → its part of the training rows, in any unit. Those without one have 1.

    Raises:
        BadMix: There is no task, a share is not positive, or is of a task that is not there.
        recipes.data.task.TaskError: A dataset is missing or does not suit the model.
    """

    name = "mix"

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, Mapping[str, Any]],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        from recipes.data import load_task
        from recipes.plan import TaskSpec

        given = dict(shares or {})
        if not tasks or given.keys() - tasks.keys() or min(given.values(), default=1) <= 0:
            raise BadMix(
                f"mix needs tasks, and a positive share for those that it names; found tasks {list(tasks)} and "
                f"shares {given}"
            )
        self.tasks: dict[str, Task] = {
            name: load_task(TaskSpec(task=name, options=dict(options or {})), config, tokenizer)
            for name, options in tasks.items()
        }
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.max_new_tokens = max(task.max_new_tokens for task in self.tasks.values())
        splits = {name: task.train for name, task in self.tasks.items()}
        self.train = Mixed(splits, {name: given.get(name, 1.0) for name in splits})
        self.test: list[Item] = [
            {"task": name, "item": item, "category": str(item.get("category", name))}
            for name, task in self.tasks.items()
            for item in task.test
        ]

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch, right-padded: each row as its own task makes it."""
        return merge([self.tasks[item["task"]].collate([item["item"]]) for item in items], self.pad_id)

    def prompts(self, items: Sequence[Item]) -> Batch:
        """Inputs of ``generate()``, left-padded."""
        rows = [self.tasks[item["task"]].prompts([item["item"]]) for item in items]
        return merge(rows, self.pad_id, side="left")

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """What the item's own task says of the first tokens that it would have let the model generate."""
        task = self.tasks[item["task"]]
        return task.score(item["item"], generated_ids[: task.max_new_tokens])
