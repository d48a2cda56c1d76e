from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import bridges
from recipes.errors import LossError
from recipes.losses import attention_weights_loss, valid_tokens
from recipes.objective import MICRO_BATCHES, Objective
from recipes.plan import Losses
from recipes.recompute import recompute_layers
from recipes.selection import converted_attention
from recipes.weight_alignment import WeightAlignment
from tests.recipes.toys import IMAGE, MODELS, batch, recipe, stage

INSIDE = {"text_window": 4, "window": (1, 2, 2), "chunk_size": 8, "gate_bias": 0.0}
FORMS = {
    "alone": {},
    "injected": {"hidden_states": {"form": "injected"}},
    "beside": {"hidden_states": {"form": "injected"}, "token_kd": 1.0},
    "chained": {"hidden_states": {"form": "chained"}, "token_kd": 1.0},
}


def pair(kind, mixer="mmate", **config):
    teacher = MODELS[kind]().requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    bridges.replace_attention(student, mixer, **config)
    return teacher, student.requires_grad_(True).train()


def measure(teacher, student, inputs, queries=100, **others):
    torch.manual_seed(1)
    losses = Losses(attention_weights={"queries": queries}, **others)
    objective = Objective(losses, student, teacher)
    counts = {MICRO_BATCHES: 1, "token_kd": (inputs["labels"] >= 0).sum()}
    with objective.measure(inputs, counts) as kwargs:
        student(**kwargs)
    objective.close()
    return objective.values["attention_weights"]


def recorded(teacher, inputs):
    """What went into each attention layer of the teacher: kwargs, by a hook of the test's own."""
    found = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: found.update({i: k}), with_kwargs=True)
        for i, layer in bridges.attention_layers(teacher).items()
    ]
    teacher(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", list(FORMS))
def test_it_is_the_divergence_of_texts_weights_on_the_teachers_input(kind, form):
    """Against plain softmax attention of the teacher's weights, written out for all tokens."""
    teacher, student = pair(kind, **INSIDE)
    inputs = batch(kind)
    text = valid_tokens(inputs) & (inputs["input_ids"] != IMAGE)
    passed, layouts = recorded(teacher, inputs), {}
    for i, layer in converted_attention(student).items():
        layer.register_forward_pre_hook(
            lambda m, a, k, i=i: layouts.update({i: k["linmu_layout"]}), with_kwargs=True
        )
    student(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    every = torch.arange(text.shape[1]).expand(len(text), -1)
    causal = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool).tril()
    expected = []
    for index, attention in bridges.attention_layers(teacher).items():
        given = passed[index]
        rotary = bridges.MixerAttention(None, 0, (1, 1, 2))._rotary(given["position_embeddings"])
        q, k = (
            project(given["hidden_states"]).unflatten(-1, (-1, 8))
            for project in (attention.q_proj, attention.k_proj)
        )
        q, k = (turned(t, *rotary).transpose(1, 2) for t in (q, k.repeat_interleave(2, dim=2)))
        scores = (q @ k.mT / 8**0.5).masked_fill(~(causal & valid_tokens(inputs)[:, None, None]), -1e9)
        made = converted_attention(student)[index].mixer.attention_weights(
            given["hidden_states"], every, layouts[index], rotary
        )
        divergence = F.kl_div(made.clamp_min(1e-30).log(), scores.softmax(-1), reduction="none").sum(-1)
        expected.append(divergence.mean(1)[text].mean())
    found = measure(teacher, student, inputs, **FORMS[form])
    torch.testing.assert_close(found, sum(expected).detach() / len(expected), rtol=1e-4, atol=1e-5)


def turned(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_student_that_still_attends_loses_nothing(kind):
    teacher, student = pair(kind, "attention")
    assert measure(teacher, student, batch(kind)) < 1e-6


def test_queries_are_drawn_anew_for_each_batch_from_text_alone():
    teacher, student = pair("qwen", **INSIDE)
    inputs = batch("qwen")
    asked = []
    for layer in converted_attention(student).values():
        weigh = layer.attention_weights
        layer.attention_weights = lambda queries, *a, weigh=weigh, **k: (
            asked.append(queries),
            weigh(queries, *a, **k),
        )[1]
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        objective = Objective(Losses(attention_weights={"queries": 2}), student, teacher)
        with objective.measure(inputs, {MICRO_BATCHES: 1}) as kwargs:
            student(**kwargs)
        objective.close()
        assert torch.equal(asked[-1], asked[-2])  # the layers of one batch have the same
        drawn |= {(row, int(q)) for row, queries in enumerate(asked[-1]) for q in queries}
    text = valid_tokens(inputs) & (inputs["input_ids"] != IMAGE)
    assert drawn == {(row, place) for row, place in text.nonzero().tolist()}


@pytest.mark.parametrize("kind", list(MODELS))
def test_rows_with_less_text_than_queries_count_what_they_have(kind):
    teacher, student = pair(kind, **INSIDE)
    inputs = batch(kind)
    few, many = (measure(teacher, student, inputs, queries) for queries in (100, 1000))
    torch.testing.assert_close(few, many)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", ["alone", "injected", "chained"])
def test_gradient_checkpointing_changes_no_gradient(kind, form):
    gradients = []
    for checkpointing in (False, True):
        teacher, student = pair(kind, **INSIDE)
        if checkpointing:
            recompute_layers(student)
        torch.manual_seed(1)
        inputs = batch(kind)
        objective = Objective(Losses(attention_weights={"queries": 3}, **FORMS[form]), student, teacher)
        with objective.measure(inputs, {MICRO_BATCHES: 1, "token_kd": 9}) as kwargs:
            student(**kwargs).loss.backward()
        objective.close()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert any("c_map" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_what_it_teaches_is_where_to_look():
    """A few steps on it bring the weights of all layers nearer to the teacher's."""
    teacher, student = pair("llama", **INSIDE)
    inputs = batch("llama")
    maps = [p for n, p in student.named_parameters() if n.endswith("_map")]
    optimizer = torch.optim.Adam(maps, 3e-2)
    found = []
    for _ in range(30):
        objective = Objective(Losses(attention_weights=1.0), student, teacher)
        with objective.measure(inputs, {MICRO_BATCHES: 1}) as kwargs:
            loss = student(**kwargs).loss
        objective.close()
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1] < 0.9 * found[0]


def test_hooks_are_gone_after_closing_and_the_teacher_is_as_it_was():
    teacher, student = pair("llama", **INSIDE)
    before = [type(layer) for layer in bridges.attention_layers(teacher).values()]
    alignment = WeightAlignment(teacher, student, Losses(attention_weights=1.0).attention_weights)
    assert all(layer._forward_hooks for layer in converted_attention(student).values())
    alignment.close()
    assert not any(layer._forward_hooks for layer in converted_attention(student).values())
    assert [type(layer) for layer in bridges.attention_layers(teacher).values()] == before


def test_the_loss_of_weights_by_hand():
    teacher = torch.tensor([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]]])
    student = torch.tensor([[[[0.25, 0.25, 0.5], [0.1, 0.9, 0.0]], [[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]]])
    first = attention_weights_loss(student, teacher, torch.tensor([[True, False]]))
    torch.testing.assert_close(first, torch.tensor(2.0).log() / 2)
    assert attention_weights_loss(student, teacher, torch.tensor([[False, False]])) == 0


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("mamba2", "the Mamba2 of layer 0 has none"),
        ({"mixer": "mmate", "config": {"normalizer": "rms"}}, "the MMate of layer 0 has none"),
    ],
)
def test_mixers_without_weights_are_refused(student, message):
    with pytest.raises(LossError, match=message):
        recipe(stage(losses={"attention_weights": 1.0}), student=student).explain(MODELS["llama"]())


def test_alone_it_reaches_the_mixers_only():
    with pytest.raises(LossError, match="reaches the mixers alone"):
        recipe(stage(losses={"attention_weights": 1.0}, trainable=["mixers", "mlp"])).explain(
            MODELS["llama"]()
        )
