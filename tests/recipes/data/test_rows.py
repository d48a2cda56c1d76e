from __future__ import annotations

from collections import Counter

import pytest
import torch

from recipes.data.rows import Collator, NotRightPadded, Rows, VisionCut, answered, cut, merge, teacher_answers
from recipes.data.task import IGNORED
from recipes.errors import CheckpointError
from recipes.objective import FROM_TEACHER
from tests.recipes.toys import MODELS, Riddles


def test_rows_of_an_image_and_of_a_video_merge():
    image = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.ones(4, 2)}
    video = {"input_ids": torch.ones(1, 5, dtype=torch.long), "pixel_values_videos": torch.zeros(6, 2)}
    merged = merge([image, video, image], pad_id=7)
    assert merged["input_ids"].tolist() == [[1, 1, 1, 7, 7], [1] * 5, [1, 1, 1, 7, 7]]
    assert (len(merged["pixel_values"]), len(merged["pixel_values_videos"])) == (8, 6)


@pytest.fixture(params=[False, True], ids=["text", "images"])
def task(request):
    return Riddles(images=request.param)


def test_rows_without_teacher_answers_are_the_items(task):
    rows = Rows(task.train, None, own=False)
    assert list(rows) == [(item, None) for item in task.train]


@pytest.mark.parametrize("answers", [1, 7, 20])
def test_every_other_row_is_the_teachers_and_each_item_and_answer_appears(task, answers):
    given = {i: torch.tensor([i]) for i in range(answers)}
    rows = [Rows(task.train, given, own=True)[i] for i in range(40)]
    assert all((answer is not None) == bool(i % 2) for i, (_, answer) in enumerate(rows))
    assert [item for item, answer in rows if answer is None] == task.train
    used = Counter(int(answer) for _, answer in rows if answer is not None)
    assert sorted(used) == list(range(answers))
    assert max(used.values()) - min(used.values()) <= 1
    assert all(item is task.train[int(answer)] for item, answer in rows if answer is not None)


def test_rows_of_the_teachers_answers_alone(task):
    given = {3: torch.tensor([5]), 8: torch.tensor([6])}
    rows = Rows(task.train, given, own=False)
    assert len(rows) == 2
    assert [row[0] for row in rows] == [task.train[3], task.train[8]]


def test_the_right_answer_from_the_teacher_makes_the_tasks_own_batch(task):
    items = task.train[:4]
    collate = Collator(task, pad_id=0)
    plain = collate([(item, None) for item in items])
    mixed = collate([(item, torch.tensor(item["answer"]) if i % 2 else None) for i, item in enumerate(items)])
    assert mixed.pop(FROM_TEACHER).tolist() == [False, True, False, True]
    assert mixed.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.equal(mixed[key], value), key


def test_training_rows_padded_on_the_left_are_refused(task, monkeypatch):
    monkeypatch.setattr(task, "collate", task.prompts, raising=False)
    rows = [(item, None) for item in task.train[:8]]
    assert not task.prompts([item for item, _ in rows])["attention_mask"].all()
    with pytest.raises(NotRightPadded, match="on the right"):
        Collator(task, pad_id=0)(rows)


def test_an_answer_is_labelled_and_the_prompt_is_not(task):
    prompt = task.prompts(task.train[:1])
    row = answered(prompt, torch.tensor([9, 2]))
    assert row["labels"][0].tolist() == [IGNORED] * prompt["input_ids"].shape[1] + [9, 2]
    assert row["input_ids"][0, -2:].tolist() == [9, 2]
    assert row["attention_mask"].all()


def test_merging_rows_is_collating_them_together(task):
    items = task.train[:3]
    merged, whole = merge([task.collate([item]) for item in items], pad_id=0), task.collate(items)
    assert all(torch.equal(merged[key], whole[key]) for key in whole)


def test_a_batch_is_cut_at_its_end(task):
    batch = task.collate(task.train[:3])
    length = batch["input_ids"].shape[1]
    short = cut(batch, length - 1)
    assert torch.equal(short["input_ids"], batch["input_ids"][:, :-1])
    assert torch.equal(short["labels"], batch["labels"][:, :-1])
    assert cut(batch, length) is batch
    if task.images:
        assert torch.equal(short["pixel_values"], batch["pixel_values"])
        with pytest.raises(VisionCut, match="max_length 3 cuts through an image"):
            cut(batch, 3)


@pytest.mark.parametrize("kind", list(MODELS))
def test_teacher_answers_are_its_greedy_generation_made_once(tmp_path, kind):
    model, task = MODELS[kind](), Riddles(images=kind == "qwen")
    path = tmp_path / "stage" / "answers.safetensors"
    answers = teacher_answers(model, task, 5, path, seed=0, batch_size=2)
    assert len(answers) == 5
    for index, answer in answers.items():
        prompt = task.prompts([task.train[index]])
        ids = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        ids = ids.tolist()
        assert answer.tolist() == (ids[: ids.index(2) + 1] if 2 in ids else ids)
    again = teacher_answers(None, task, 5, path, seed=0, batch_size=2)
    assert {i: a.tolist() for i, a in again.items()} == {i: a.tolist() for i, a in answers.items()}
    for samples, seed in ((4, 0), (5, 1)):
        with pytest.raises(CheckpointError, match="answers to 5 items"):
            teacher_answers(None, task, samples, path, seed=seed, batch_size=2)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError):
        teacher_answers(None, task, 5, path, seed=0, batch_size=2)


def test_answers_end_at_the_end_token(tmp_path):
    class Ends:
        device = torch.device("cpu")
        generation_config = type("Config", (), {"eos_token_id": [2, 7]})

        def generate(self, input_ids, **kwargs):
            tails = torch.tensor([[5, 2, 0], [7, 0, 0], [5, 5, 5]])
            return torch.cat([input_ids, tails[: len(input_ids)]], dim=1)

    task = Riddles(images=False, items=3)
    answers = teacher_answers(Ends(), task, 9, tmp_path / "a", seed=0, batch_size=3)
    assert sorted(answer.tolist() for answer in answers.values()) == [[5, 2], [5, 5, 5], [7]]
