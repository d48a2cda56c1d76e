"""A mix: shares are kept, every item comes, and rows are those that the tasks themselves make."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from recipes.data import load_task
from recipes.data.mix import BadMix, Mix, Mixed
from recipes.data.recall import Recall
from recipes.data.task import Task
from recipes.evaluate import evaluate
from recipes.plan import TaskSpec
from tests.recipes.data.test_recall import build_tokenizer
from tests.recipes.toys import llama

RECALL = {"lengths": [256], "train_size": 3, "test_size": 2}
TEXT = {"length": 64, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def mix(tokenizer) -> Mix:
    options = {"tasks": {"text": TEXT, "recall": RECALL}, "shares": {"text": 3, "recall": 1}}
    found = load_task(TaskSpec(task="mix", options=options), llama().config, tokenizer)
    assert isinstance(found, Mix)
    return found


def test_it_is_a_task(mix):
    assert isinstance(mix, Task)
    assert mix.max_new_tokens == max(task.max_new_tokens for task in mix.tasks.values())


@pytest.mark.parametrize(("sizes", "shares"), [((100, 7), (1, 1)), ((5, 300), (0.9, 0.1)), ((1, 1), (2, 1))])
def test_shares_are_kept_all_along_and_every_item_comes(sizes, shares):
    splits = {name: [{"n": i} for i in range(size)] for name, size in zip("ab", sizes)}
    mixed = Mixed(splits, dict(zip("ab", shares)))
    rows = list(mixed)
    part = shares[0] / sum(shares)
    for row in range(1, len(rows) + 1):
        assert abs(sum(r["task"] == "a" for r in rows[:row]) - part * row) <= 1
    for name, size in zip("ab", sizes):
        seen = Counter(row["item"]["n"] for row in rows if row["task"] == name)
        assert set(seen) == set(range(size))
        assert max(seen.values()) - min(seen.values()) <= 1


def test_a_mix_knows_the_sizes_of_its_rows_if_all_parts_do():
    class Sized(list):
        sizes = (7, 9)

    shares = {"a": 1.0, "b": 1.0}
    assert Mixed({"a": Sized("xy"), "b": Sized("zw")}, shares).sizes == [7, 7, 9, 9]
    assert not hasattr(Mixed({"a": Sized("xy"), "b": ["z", "w"]}, shares), "sizes")


def test_a_row_is_that_of_its_task(mix):
    items = [mix.train[i] for i in range(8)]
    assert {item["task"] for item in items} == {"text", "recall"}
    for item in items:
        task = mix.tasks[item["task"]]
        for ours, theirs in ((mix.collate, task.collate), (mix.prompts, task.prompts)):
            row, own = ours([item]), theirs([item["item"]])
            assert row.keys() == own.keys()
            assert all(torch.equal(row[key], own[key]) for key in own)


def test_answers_are_judged_by_their_own_task(mix, tokenizer):
    recall = mix.tasks["recall"]
    assert isinstance(recall, Recall)
    for item in mix.test[-4:]:
        answer = torch.tensor(tokenizer(f" {item['item']['answer']}")["input_ids"] + [tokenizer.eos_token_id])
        assert mix.score(item, answer) == 1.0
        assert mix.score(item, answer.flip(0)[:1]) == 0.0
    model = llama()
    model.resize_token_embeddings(len(tokenizer))
    groups = evaluate(model, mix, limit=len(mix.test), batch_size=16).groups
    assert set(groups) == {"text", *(f"{kind} 256" for kind in recall.kinds)}


def test_rows_with_and_without_an_image_mix():
    from recipes.data.rows import merge

    text = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    image = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0]]),
        "pixel_values": torch.ones(8, 3),
    }
    for side, kinds in (("right", [[0, 0, 0, 0], [0, 1, 1, 0]]), ("left", [[0, 0, 0, 0], [0, 1, 1, 0]])):
        merged = merge([text, image], pad_id=9, side=side)
        assert merged["mm_token_type_ids"].tolist() == kinds
        assert merged["input_ids"][0].tolist() == ([1, 1, 9, 9] if side == "right" else [9, 9, 1, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": {}},
        {"tasks": {"text": TEXT}, "shares": {"text": 0}},
        {"tasks": {"text": TEXT}, "shares": {"x": 1}},
    ],
)
def test_a_bad_mix_is_refused(options, tokenizer):
    with pytest.raises(BadMix):
        load_task(TaskSpec(task="mix", options=options), llama().config, tokenizer)
