from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from recipes.errors import LossError
from recipes.losses import (
    OutputHead,
    check_head,
    cross_entropy,
    hidden_state_loss,
    predicted_tokens,
    token_kd,
    valid_tokens,
)
from tests.recipes.toys import llama

VOCABULARY, DIM = 50, 6


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that the memory of any tensor made inside had room for."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def heads(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.nn.Linear(DIM, VOCABULARY, bias=False, dtype=dtype) for _ in range(2))
    for head in (student, teacher):
        torch.nn.init.normal_(head.weight, generator=generator)
    return student.weight, student, teacher.requires_grad_(False)


def hidden(tokens, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, DIM, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_kd_is_the_full_formula_with_its_gradients(chunk, temperature):
    weight, student_head, teacher_head = heads()
    student, teacher = hidden(7), hidden(7, seed=2)
    loss = token_kd(student_head, teacher_head, student, teacher, temperature=temperature, chunk=chunk)

    p = F.softmax(teacher_head(teacher) / temperature, -1)
    q = F.softmax(student_head(student) / temperature, -1)
    expected = temperature**2 * (p.detach() * (p.log().detach() - q.log())).sum(-1).mean()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    inputs = (weight, student)
    for made, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.autograd.grad(loss.new_ones((), requires_grad=True) * 1, teacher, allow_unused=True)[0]


def test_kd_of_equal_models_is_zero_and_of_others_positive():
    _, student_head, teacher_head = heads()
    h = hidden(5)
    assert abs(token_kd(student_head, student_head, h, h).item()) < 1e-6
    assert token_kd(student_head, teacher_head, h, h).item() > 0.1


@pytest.mark.parametrize("chunk", [2, 100])
def test_chunked_cross_entropy_is_the_full_formula(chunk):
    weight, student_head, _ = heads()
    student, labels = hidden(7), torch.arange(7)
    loss = cross_entropy(student_head, student, labels, chunk=chunk)
    expected = F.cross_entropy(student_head(student), labels)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    inputs = (weight, student)
    for made, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_shares_of_a_batch_add_up_to_the_whole():
    _, student_head, teacher_head = heads()
    student, teacher = hidden(7), hidden(7, seed=2)
    whole = token_kd(student_head, teacher_head, student, teacher)
    parts = [
        token_kd(student_head, teacher_head, s, t, count=torch.tensor(7))
        for s, t in zip(student.split(3), teacher.split(3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_no_token_gives_zero_with_a_zero_gradient():
    _, student_head, teacher_head = heads()
    student = hidden(4)
    none = student[:0]
    for loss in (
        token_kd(student_head, teacher_head, none, none),
        token_kd(student_head, teacher_head, none, none, count=torch.tensor(0)),
        cross_entropy(student_head, none, torch.empty(0, dtype=torch.long)),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].abs().sum() == 0
    outside = torch.zeros(1, 4, dtype=torch.bool)
    assert hidden_state_loss(student[None], student[None].detach() + 1, outside).item() == 0


@pytest.mark.parametrize("kind", ["kd", "cross-entropy"])
def test_no_full_vocabulary_tensor_is_larger_than_a_chunk(kind):
    """Forward and backward: the largest tensor is a chunk's logits, or the head's weight, or the hidden states."""
    tokens, chunk = 512, 8
    weight, student_head, teacher_head = heads(torch.float32)
    student, teacher = hidden(tokens, dtype=torch.float32), hidden(tokens, seed=2, dtype=torch.float32)
    with LargestTensor() as largest:
        if kind == "kd":
            loss = token_kd(student_head, teacher_head, student, teacher, chunk=chunk)
        else:
            loss = cross_entropy(student_head, student, torch.zeros(tokens, dtype=torch.long), chunk=chunk)
        loss.backward()
    assert largest.numbers <= max(chunk * VOCABULARY, VOCABULARY * DIM, tokens * DIM)
    assert largest.numbers < tokens * VOCABULARY
    assert weight.grad is not None


def test_hidden_state_loss_is_a_fraction_of_the_teachers_size():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, DIM, generator=generator)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    wanted = (student - teacher)[valid].square().sum() / teacher[valid].square().sum()
    torch.testing.assert_close(hidden_state_loss(student, teacher, valid), wanted)
    torch.testing.assert_close(hidden_state_loss(1000 * student, 1000 * teacher, valid), wanted)
    assert float(hidden_state_loss(torch.zeros_like(teacher), teacher, valid)) == pytest.approx(1)


def test_hidden_state_loss_of_several_kinds_is_the_mean_over_those_that_are_there():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, DIM, generator=generator)
    teacher[0] *= 100  # the kind that would drown the other
    kinds = torch.zeros(3, 2, 5, dtype=torch.bool)
    kinds[0, 0], kinds[1, 1, :3] = True, True
    apart = [hidden_state_loss(student, teacher, kind) for kind in kinds[:2]]
    assert float(apart[0]) < 0.9 * float(apart[1])
    torch.testing.assert_close(hidden_state_loss(student, teacher, *kinds), sum(apart) / 2)
    torch.testing.assert_close(hidden_state_loss(student, teacher, kinds[0], kinds[2]), apart[0])
    assert hidden_state_loss(student, teacher, kinds[2], kinds[2]) == 0


def test_hidden_state_loss_does_not_read_padding():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, DIM, generator=generator)
    valid = torch.tensor([[True, True, False, False]])
    student.requires_grad_()
    before = hidden_state_loss(student, teacher, valid)
    garbage = teacher.clone()
    garbage[0, 2:] = float("nan")
    after = hidden_state_loss(student, garbage, valid)
    assert torch.equal(before, after)
    after.backward()
    assert student.grad[0, 2:].abs().sum() == 0


def test_predicted_tokens_are_those_before_a_label_or_a_token():
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100], [-100, -100, -100, 7]]),
    }
    assert predicted_tokens(batch, "labelled").tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert predicted_tokens(batch, "valid").tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert valid_tokens({"input_ids": torch.zeros(1, 2)}).all()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"final_logit_softcapping": 2.0},
        {"logits_scaling": 4.0},
        {"tie_word_embeddings": True},
    ],
)
def test_output_head_scales_and_caps_as_the_config_says(config):
    model = llama(**config)
    h = torch.randn(3, 32)
    logits = model.lm_head(h) / config.get("logits_scaling", 1.0)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * (logits / cap).tanh()
    torch.testing.assert_close(OutputHead(model)(h), logits)


def test_a_head_that_is_not_the_models_is_refused():
    model = llama()
    h = torch.randn(3, 32)
    check_head(model, OutputHead(model), h, model.lm_head(h))
    with pytest.raises(LossError, match="LlamaForCausalLM"):
        check_head(model, OutputHead(model), h, 2 * model.lm_head(h))
