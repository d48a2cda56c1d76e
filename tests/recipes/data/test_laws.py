"""What holds of every dataset: batches are rows laid together, prompts begin rows, and a place has one item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.data import TASKS, load_task
from recipes.data.dialogue import make_chats
from recipes.data.task import IGNORED, Batch, Item, Task
from recipes.plan import TaskSpec
from recipes.tiny_vlm import build as tiny_vlm
from tests.recipes.data import toy_corpora
from tests.recipes.data.test_recall import build_tokenizer
from tests.recipes.data.toy_pack import toy_config, toy_pack
from tests.recipes.toys import llama

SMALL: dict[str, dict[str, Any]] = {
    "chats": {"test_size": 12},
    "easy-vqa": {},
    "pictures": {
        "lengths": [256, 512],
        "test_lengths": [64, 128],
        "train_size": 14,
        "test_size": 14,
        "further": 2,
    },
    "recall": {"lengths": [400, 700], "train_size": 3, "test_size": 2, "answer_every": 200},
    "text": {"corpora": ["brown"], "held_out": ["fortunes"], "length": 64},
}
"""Dataset → options; a mix is of all that have the same tokenizer."""


class Shop:
    """Makes datasets, each with the model's config that it is made for."""

    def __init__(self, pack: str) -> None:
        pictures = {**SMALL["pictures"], "pack": pack}
        mixed = {**SMALL, "pictures": pictures}
        del mixed["easy-vqa"]
        self.options = {**SMALL, "pictures": pictures, "mix": {"tasks": mixed, "shares": {"recall": 2}}}
        self.made: dict[str, Task] = {}

    def config(self, name: str) -> Any:
        return tiny_vlm.build_config(tiny_vlm.build_tokenizer()) if name == "easy-vqa" else toy_config()

    def fresh(self, name: str) -> Task:
        tokenizer = tiny_vlm.build_tokenizer() if name == "easy-vqa" else build_tokenizer("chat")
        return load_task(TaskSpec(task=name, options=self.options[name]), self.config(name), tokenizer)

    def task(self, name: str) -> Task:
        if name not in self.made:
            self.made[name] = self.fresh(name)
        return self.made[name]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("data")
    toy_pack().save(folder / "pack.zip")
    tokenizer = build_tokenizer("chat")
    with pytest.MonkeyPatch.context() as patch:
        toy_corpora.fill(folder, tokenizer, patch)
        model = llama(vocab_size=len(tokenizer))
        make_chats(model, tokenizer, conversations=12, answer_length=5, batch_size=6)
        yield Shop(str(folder / "pack.zip"))


every_dataset = pytest.mark.parametrize("name", TASKS)
both_splits = pytest.mark.parametrize("split", ["train", "test"])


def chosen(task: Task, split: str, count: int = 9) -> list[Item]:
    """Items from all over a split."""
    items = getattr(task, split)
    return [items[place * (len(items) - 1) // (count - 1)] for place in range(count)]


def check_merged(batch: Batch, rows: Sequence[Batch], side: str) -> None:
    """A batch is its rows: what has a value a token is padded on one side, the rest stands end to end."""
    mask = batch["attention_mask"]
    assert mask.shape == batch["input_ids"].shape
    assert set(batch) == set().union(*rows)
    for key, value in batch.items():
        alone = [row[key] for row in rows if key in row]
        if any(key in row and row[key].shape != row["input_ids"].shape for row in rows):
            assert torch.equal(value, torch.cat(alone)), key
            continue
        assert value.shape == mask.shape, key
        for place, row in enumerate(rows):
            size = row["input_ids"].shape[1]
            here = slice(0, size) if side == "right" else slice(mask.shape[1] - size, None)
            assert mask[place].sum() == mask[place, here].sum() == size
            if key in row:
                assert torch.equal(value[place, here], row[key][0]), key
            else:
                assert not value[place, here].any(), key
    if "labels" in batch:
        assert (batch["labels"][mask == 0] == IGNORED).all()


@both_splits
@every_dataset
def test_a_batch_is_its_rows_laid_together(shop: Shop, name: str, split: str) -> None:
    task = shop.task(name)
    items = chosen(task, split)
    for make, side in ((task.collate, "right"), (task.prompts, "left")):
        rows = [make([item]) for item in items]
        assert all(row["attention_mask"].all() for row in rows)
        assert (
            name == "text" or len({row["input_ids"].shape[1] for row in rows}) > 1
        )  # else nothing is padded
        check_merged(make(items), rows, side)


@both_splits
@every_dataset
def test_a_prompt_is_the_beginning_of_its_row(shop: Shop, name: str, split: str) -> None:
    """And the labels are of the whole row, or begin where the prompt ends; the last token has one."""
    task = shop.task(name)
    for item in chosen(task, split):
        prompt, row = task.prompts([item]), task.collate([item])
        assert prompt.keys() == row.keys() - {"labels"}
        size = prompt["input_ids"].shape[1]
        for key, value in prompt.items():
            whole = row[key][:, :size] if value.shape == prompt["input_ids"].shape else row[key]
            assert torch.equal(value, whole), key
        labelled = (row["labels"][0] != IGNORED).nonzero()
        assert int(labelled[0]) in (0, size)
        assert int(labelled[-1]) == row["labels"].shape[1] - 1


@both_splits
@every_dataset
def test_every_id_is_of_the_vocabulary_and_every_label_the_token_at_its_place(
    shop: Shop, name: str, split: str
) -> None:
    task, words = shop.task(name), shop.config(name).get_text_config().vocab_size
    items = chosen(task, split)
    batch = task.collate(items)
    for ids in (batch["input_ids"], task.prompts(items)["input_ids"]):
        assert ids.dtype == torch.long
        assert 0 <= ids.min() <= ids.max() < words
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@both_splits
@every_dataset
def test_an_item_is_a_function_of_its_place(shop: Shop, name: str, split: str) -> None:
    ours, theirs = getattr(shop.task(name), split), getattr(shop.fresh(name), split)
    size = len(ours)
    assert size == len(theirs)
    places = sorted({place * (size - 1) // 29 for place in range(30)})
    again = {place: theirs[place] for place in reversed(places)}
    assert all(same(ours[place], again[place]) for place in places)
    assert all(same(a, b) for a, b in zip(ours[1:4], (again.get(i, theirs[i]) for i in range(1, 4))))
    assert same(ours[-1], theirs[size - 1])
    with pytest.raises(IndexError):
        ours[size]


@every_dataset
def test_sizes_order_rows_as_their_lengths_do(shop: Shop, name: str) -> None:
    """Roughly: of two rows of which one is said to be much larger, it is longer."""
    task = shop.task(name)
    sizes = getattr(task.train, "sizes", None)
    if sizes is None:
        pytest.skip("its rows are of about one size")
    assert len(sizes) == len(task.train)
    places = sorted({place * (len(sizes) - 1) // 49 for place in range(50)})
    known = [(sizes[place], task.collate([task.train[place]])["input_ids"].shape[1]) for place in places]
    unlike = [pair for pair in combinations(sorted(known), 2) if 1.5 * pair[0][0] < pair[1][0]]
    right = sum(small[1] < large[1] for small, large in unlike)
    assert right >= 0.9 * len(unlike)
    assert unlike or name == "text"
