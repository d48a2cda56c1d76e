from __future__ import annotations

import pytest
import torch

from recipes.data import load_task
from recipes.data.task import Task, UnsupportedModel
from recipes.data.text import Text, TooLittleText, python_topics
from recipes.errors import UnknownKeyError, UnknownTaskError
from recipes.plan import TaskSpec


class Characters:
    """A tokenizer of characters."""

    eos_token_id, pad_token_id = 0, 0

    def __call__(self, texts, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_text(chr(ord("a") + i) * 9, encoding="utf-8")
    return paths


def test_documents_are_held_out_whole(files):
    task = Text(Characters(), files=files, length=4, holdout=4, max_new_tokens=2)
    train = {int(i) for item in task.train for i in item["input_ids"]}
    test = {int(i) for item in task.test for i in item["input_ids"]}
    assert train - {0} == {ord(c) for c in "abc"}
    assert test - {0} == {ord("d")}
    assert len(task.train) == 3 * 10 // 4
    assert torch.cat([item["input_ids"] for item in task.train])[9] == 0


def test_every_token_is_its_own_label(files):
    task = Text(Characters(), files=files, length=4, holdout=4, max_new_tokens=2)
    batch = task.collate(task.train[:2])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape == (2, 4)


def test_a_prompt_is_half_a_window_and_the_rest_is_the_answer(files):
    task = Text(Characters(), files=files, length=4, holdout=4, max_new_tokens=2)
    item = task.test[0]
    assert task.prompts([item])["input_ids"].shape == (1, 2)
    truth = item["input_ids"][2:4]
    assert task.score(item, truth) == 1
    assert task.score(item, truth[:1]) == 0.5
    assert task.score(item, truth + 1) == 0
    assert isinstance(task, Task)


def test_without_files_it_is_pythons_own_documentation():
    task = load_task(TaskSpec(task="text", options={"length": 256}), None, Characters())
    assert any("lambda" in topic for topic in python_topics())
    assert len(task.train) > 1000
    assert len(task.test) > 20


@pytest.mark.parametrize(
    ("options", "error"),
    [({"length": 1}, ValueError), ({"max_new_tokens": 9}, ValueError), ({"length": 1000}, TooLittleText)],
)
def test_bad_sizes_are_refused(files, options, error):
    with pytest.raises(error):
        Text(Characters(), files=files, **{"length": 4, "max_new_tokens": 2, **options})


def test_a_tokenizer_without_an_end_is_refused(files):
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    with pytest.raises(UnsupportedModel):
        Text(tokenizer, files=files)


def test_unknown_datasets_and_options_are_refused_with_near_names():
    with pytest.raises(UnknownTaskError, match="Did you mean 'easy-vqa'"):
        load_task(TaskSpec(task="easyvqa"), None, Characters())
    with pytest.raises(UnknownKeyError, match="Did you mean 'length'"):
        load_task(TaskSpec(task="text", options={"lenght": 3}), None, Characters())
