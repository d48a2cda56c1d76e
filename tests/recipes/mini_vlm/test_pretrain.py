"""The projector's start: tokens of a picture come to lie near its name among the words, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from recipes.data.pictures.task import Pictures
from recipes.mini_vlm.pretrain import pretrain_projector
from tests.recipes.data.toy_pack import toy_pack


@pytest.fixture
def task(model, tokenizer):
    return Pictures(model.config, tokenizer, toy_pack(), lengths=[64], test_lengths=[64], train_size=200)


@pytest.fixture
def items(task):
    """Pictures of six things, called by words that the toy's tokenizer knows."""
    captioned = task.captioned(200)
    words = dict(
        zip(sorted({item["answer"] for item in captioned}), ("red", "blue", "circle", "yes", "no", "teal"))
    )
    return [{**item, "answer": words[item["answer"]]} for item in captioned if item["answer"] in words]


def named_rightly(model, task, items):
    """How many vision tokens are nearer, by angle, to the name of their picture than to any other."""
    names = sorted({item["answer"] for item in items})
    words = model.get_input_embeddings().weight.float()
    places = torch.stack([words[ids].mean(0) for ids in task.answer_ids(names)])
    batch = task.prompts(items)
    with torch.no_grad():
        tower = model.model.visual
        seen = tower(batch["pixel_values"], batch["image_grid_thw"]).last_hidden_state
        tokens = tower.projector(seen).float()
    middle = places.mean(0)
    nearest = (F.normalize(tokens - middle, dim=1) @ F.normalize(places - middle, dim=1).T).argmax(1)
    wanted = torch.tensor([names.index(item["answer"]) for item in items]).repeat_interleave(
        len(tokens) // len(items)
    )
    return float((nearest == wanted).float().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_come_to_lie_near_their_names(model, task, items, dtype):
    model.to(dtype)
    task.patcher.dtype = dtype
    before = copy.deepcopy(model.state_dict())
    start = named_rightly(model, task, items)
    losses = pretrain_projector(model, task, items, steps=60, batch_size=256)
    assert losses[-1] < 0.6 * losses[0]
    assert named_rightly(model, task, items) > max(0.7, start)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]) == ("projector" not in name), name


def test_a_seed_gives_the_same_start(model, task, items):
    other = copy.deepcopy(model)
    losses = [pretrain_projector(m, task, items, steps=3, batch_size=32) for m in (model, other)]
    assert losses[0] == losses[1]


def test_nothing_to_name_changes_nothing(model, task):
    before = copy.deepcopy(model.state_dict())
    assert pretrain_projector(model, task, []) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
