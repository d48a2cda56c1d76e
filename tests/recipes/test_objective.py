from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import bridges
from recipes.data.task import IGNORED
from recipes.errors import LossError
from recipes.objective import FROM_TEACHER, MICRO_BATCHES, Objective, token_masks
from recipes.plan import Losses
from tests.recipes.test_losses import LargestTensor
from tests.recipes.toys import MODELS, batch

ALL = {
    "hidden_states": {"weight": 0.5, "form": "chained"},
    "token_kd": {"weight": 2.0, "temperature": 1.5, "chunk": 3},
    "sequence_kd": 0.25,
    "task": 0.75,
}


def pair(kind, **config):
    teacher = MODELS[kind](**config).requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    bridges.replace_attention(student, "mmate", text_window=4, window=(1, 2, 2), chunk_size=8)
    return teacher, student.requires_grad_(True).train()


def measure(teacher, student, losses, inputs, scale=1.0):
    counts = {name: mask.sum() for name, mask in token_masks(losses, inputs).items()}
    objective = Objective(losses, student, teacher)
    with objective.measure(inputs, {MICRO_BATCHES: 1, **counts}, scale) as kwargs:
        loss = student(**kwargs).loss
    objective.close()
    return loss, objective.values


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("tokens", ["labelled", "valid"])
def test_each_loss_is_the_plain_formula_on_full_logits(kind, tokens):
    teacher, student = pair(kind)
    losses = Losses(**{**ALL, "token_kd": {**ALL["token_kd"], "tokens": tokens}})
    inputs = batch(kind) | {FROM_TEACHER: torch.tensor([False, True, False])}
    loss, values = measure(teacher, student, losses, inputs)

    forward = {k: v for k, v in inputs.items() if k not in ("labels", FROM_TEACHER)}
    s = student(**forward, use_cache=False).logits[:, :-1]
    t = teacher(**forward, use_cache=False).logits[:, :-1]
    labels, mask = inputs["labels"][:, 1:], inputs["attention_mask"][:, 1:].bool()
    kd = F.kl_div((s / 1.5).log_softmax(-1), (t / 1.5).softmax(-1), reduction="none").sum(-1) * 1.5**2
    wanted = {"token_kd": kd[mask if tokens == "valid" else labels != IGNORED].mean()}
    for name, rows in (("task", [0, 2]), ("sequence_kd", [1])):
        wanted[name] = F.cross_entropy(s[rows].flatten(0, 1), labels[rows].flatten(), ignore_index=IGNORED)
    for name, value in wanted.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-4, atol=1e-5)

    total = sum(weight * values[name] for name, weight in losses.weights.items())
    torch.testing.assert_close(loss.detach(), total)
    # The gradient too, of the token losses: that of hidden states has its own test.
    tokens_only = Losses(**{k: v for k, v in losses.model_dump().items() if k != "hidden_states"})
    loss, _ = measure(teacher, student, tokens_only, inputs)
    plain = sum(weight * wanted[name] for name, weight in tokens_only.weights.items())
    trained = [p for p in student.parameters() if p.requires_grad]
    made = torch.autograd.grad(loss, trained, allow_unused=True)
    expected = torch.autograd.grad(plain, trained, allow_unused=True)
    for a, b in zip(made, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_teacher_runs_once_and_never_gets_a_gradient(kind):
    teacher, student = pair(kind)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    loss, _ = measure(teacher, student, Losses(hidden_states=1.0, token_kd=1.0), batch(kind))
    loss.backward()
    assert len(calls) == 1
    assert all(p.grad is None for p in teacher.parameters())


def test_a_step_never_makes_the_logits_of_a_batch():
    vocabulary, rows = 4096, 8
    teacher, student = pair("llama", vocab_size=vocabulary)
    inputs = batch("llama", rows)
    losses = Losses(token_kd={"tokens": "valid", "chunk": 4}, task=1.0)
    with LargestTensor() as largest:
        loss, _ = measure(teacher, student, losses, inputs)
        loss.backward()
    tokens = inputs["input_ids"].numel()
    assert largest.numbers == vocabulary * 32  # the embedding
    assert largest.numbers < tokens * vocabulary / 2


def test_shares_of_two_processes_average_to_the_whole():
    teacher, student = pair("llama")
    losses, whole = Losses(token_kd=1.0), batch("llama", 4)
    counts = {MICRO_BATCHES: 1, "token_kd": token_masks(losses, whole)["token_kd"].sum()}
    shares = []
    for rows in (slice(0, 1), slice(1, 4)):
        objective = Objective(losses, student, teacher)
        with objective.measure({k: v[rows] for k, v in whole.items()}, counts, scale=2.0) as kwargs:
            shares.append(student(**kwargs).loss.detach())
        objective.close()
    torch.testing.assert_close(sum(shares) / 2, measure(teacher, student, losses, whole)[0].detach())


def test_a_batch_without_labels_costs_nothing():
    teacher, student = pair("llama")
    inputs = batch("llama")
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss, values = measure(teacher, student, Losses(token_kd=1.0, task=1.0), inputs)
    loss.backward()
    assert loss.item() == 0
    assert set(values) == {"token_kd", "task"}
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in student.parameters())


def test_outside_a_measurement_the_student_is_itself():
    teacher, student = pair("llama")
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    before, hooks = student(**inputs).logits, [dict(m._forward_hooks) for m in (student, teacher.model)]
    objective = Objective(Losses(hidden_states={"form": "chained"}, task=1.0), student, teacher)
    assert torch.equal(student(**inputs).logits, before)
    assert student(**inputs).loss is None
    objective.close()
    assert [dict(m._forward_hooks) for m in (student, teacher.model)] == hooks


def test_a_model_that_bends_its_logits_is_refused():
    teacher, student = pair("llama")
    student.lm_head.register_forward_hook(lambda m, a, out: out)  # harmless
    measure(teacher, student, Losses(task=1.0), batch("llama"))
    forward = student.forward

    def bent(*args, **kwargs):
        out = forward(*args, **kwargs)
        out["logits"] = out["logits"] * 3
        return out

    student.forward = bent
    with pytest.raises(LossError, match="in another way"):
        measure(teacher, student, Losses(task=1.0), batch("llama"))
