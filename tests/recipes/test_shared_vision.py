from __future__ import annotations

import copy

import pytest
import torch

import bridges
from recipes.objective import MICRO_BATCHES, Objective, token_masks
from recipes.plan import Losses
from recipes.shared_vision import SharedVision
from tests.recipes.toys import MODELS, batch

LOSSES = Losses(hidden_states={"form": "chained"}, token_kd=1.0, task=1.0)


def pair(kind):
    teacher = MODELS[kind]().requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    bridges.replace_attention(student, "mmate", text_window=4, window=(1, 2, 2), chunk_size=8)
    for attention in bridges.attention_layers(student).values():
        attention.requires_grad_(True)
    return teacher, student.train()


def looks(model):
    """Return a list that grows by one each time the vision tower computes."""
    calls = []
    model.model.visual.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    return calls


def step(teacher, student, share=True):
    inputs = batch("qwen")
    objective = Objective(LOSSES, student, teacher)
    objective.vision.shared &= share
    counts = {MICRO_BATCHES: 1, **{k: m.sum() for k, m in token_masks(LOSSES, inputs).items()}}
    with objective.measure(inputs, counts) as kwargs:
        loss = student(**kwargs).loss
    objective.close()
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


def test_the_student_does_not_look_again_and_learns_the_same():
    teacher, student = pair("qwen")
    twin, once, twice = copy.deepcopy(student), looks(student), None
    shared = step(teacher, student)
    twice = looks(twin)
    alone = step(teacher, twin, share=False)
    assert (len(once), len(twice)) == (0, 1)
    assert torch.equal(shared[0], alone[0])
    for a, b in zip(shared[1], alone[1]):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("why", ["trained", "different"])
def test_a_tower_of_its_own_is_run(why):
    teacher, student = pair("qwen")
    tower = student.model.visual
    if why == "trained":
        tower.requires_grad_(True)
    else:
        with torch.no_grad():
            next(tower.parameters()).add_(1)
    calls = looks(student)
    _, gradients = step(teacher, student)
    assert len(calls) == 1
    assert (next(tower.parameters()).grad is not None) == (why == "trained")
    assert gradients


def test_afterwards_the_tower_is_itself():
    teacher, student = pair("qwen")
    step(teacher, student)
    assert "forward" not in vars(student.model.visual)
    calls = looks(student)
    student(**{k: v for k, v in batch("qwen").items() if k != "labels"})
    assert len(calls) == 1


def test_a_text_model_has_nothing_to_share():
    assert not SharedVision(*pair("llama")).shared
