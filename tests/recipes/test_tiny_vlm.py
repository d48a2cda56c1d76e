"""The model that ships: what it is, that it sees, and that its training is what it says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from recipes.data.easyvqa import EasyVQA
from recipes.data.task import IGNORED
from recipes.evaluate import evaluate
from recipes.tiny_vlm import WEIGHTS, load
from recipes.tiny_vlm.build import build_model, build_tokenizer
from recipes.tiny_vlm.packing import Packer, attend_in_one_call, by_image
from recipes.tiny_vlm.train import main


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def task(loaded):
    model, tokenizer = loaded
    return EasyVQA(model.config, tokenizer)


def answers(model, inputs, new_tokens):
    outputs = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return outputs[:, inputs["input_ids"].shape[1] :]


def test_what_ships_is_the_real_class_in_fp32_and_small(model):
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 8e6
    assert model.config.text_config.max_position_embeddings >= 262_144
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_auto_classes_load_it_too(model, task):
    other = AutoModelForImageTextToText.from_pretrained(WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    question = "does the image not contain a gray triangle?"
    assert AutoTokenizer.from_pretrained(WEIGHTS)(question)["input_ids"] == task.ids([question])[0]


def test_the_tokenizer_that_ships_is_the_one_that_is_built(task):
    assert task.tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_it_answers_the_test_split(model, task):
    majority = max(sum(item["answer"] == a for item in task.test) for a in ("yes", "no")) / len(task.test)
    assert majority < 0.4
    assert evaluate(model, task, limit=200).accuracy >= 0.97


def test_it_looks_at_the_image(model, task):
    items = [item for item in task.test if item["answer"] not in ("yes", "no")][:96]
    inputs = task.prompts(items)
    inputs["pixel_values"] = (
        inputs["pixel_values"].view(len(items), -1).roll(1, 0).view_as(inputs["pixel_values"])
    )
    shown = items[-1:] + items[:-1]
    said = answers(model, inputs, task.max_new_tokens)
    changed = [(a, b, ids) for a, b, ids in zip(items, shown, said) if a["question"] == b["question"]]
    assert len(changed) > 0
    right = sum(task.score(b, ids) for _, b, ids in changed)
    assert right >= 0.9 * len(changed)


def test_left_padding_changes_no_answer(model, task):
    items = task.test[:4000:250]
    inputs = task.prompts(items)
    assert not inputs["attention_mask"].all()
    together = answers(model, inputs, task.max_new_tokens)
    for item, row in zip(items, together):
        assert torch.equal(answers(model, task.prompts([item]), task.max_new_tokens)[0], row)


def test_it_reads_a_slideshow(model, task):
    inputs = task.slideshow(5 * 64)
    with torch.no_grad():
        logits = model(**inputs).logits
        inputs["pixel_values_videos"] = -inputs["pixel_values_videos"]
        changed = model(**inputs).logits
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0, -1], changed[0, -1])


def test_a_slideshow_of_one_image_is_answered_as_the_image(model, task):
    item = next(item for item in task.test if item["question"] == "what color is the shape?")
    first = task.test[0]["image"]
    image = task.prompts([{**item, "image": first}])
    with torch.no_grad():
        still, video = model(**image).logits, model(**task.slideshow(64, item["question"])).logits
    torch.testing.assert_close(video[0, -1], still[0, -1], rtol=1e-4, atol=1e-4)


def test_packed_rows_give_the_loss_and_gradients_of_plain_rows():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    task = EasyVQA(model.config, tokenizer)
    images = by_image(task.train)[:3]
    plain, packed = task.collate([item for items in images for item in items]), Packer(model, task)(images)
    assert packed["input_ids"].numel() < plain["input_ids"].numel() / 3

    def run(batch):
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        return out.logits[batch["labels"] != IGNORED], out.loss, grads

    expected = run(plain)
    for batched_windows in (False, True):
        if batched_windows:
            attend_in_one_call(model)
        for a, b in zip(expected, run(packed)):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_windows_of_several_lengths_are_refused():
    model = build_model(build_tokenizer())
    attend_in_one_call(model)
    grid = torch.tensor([[1, 12, 12]])  # 6×6 tokens: a window of 4×4 and three smaller ones
    with pytest.raises(ValueError, match="not of one length"):
        model.model.visual(torch.zeros(144, 96), grid_thw=grid)


def test_training_is_seeded_and_leaves_a_complete_folder(tmp_path, capsys):
    arguments = ["--epochs", "0.004", "--batch-size", "2", "--questions", "4", "--device", "cpu"]
    for run in ("a", "b"):
        main(["--out", str(tmp_path / run), *arguments])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["questions"] == 4
    assert 0 <= result["accuracy"] <= 1
    first, second = (load(tmp_path / run)[0] for run in ("a", "b"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    torch.manual_seed(0)
    start = build_model(build_tokenizer())
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters()) if a.ndim > 1)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipes\.tiny_vlm\.train"):
        load(tmp_path)
