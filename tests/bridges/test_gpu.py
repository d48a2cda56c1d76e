"""Converted models on a CUDA device: identity, cached generation, bf16, a training step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import bridges
from tests.bridges import models
from tests.helpers import assert_close

pytestmark = pytest.mark.gpu
every_family = pytest.mark.parametrize("family", models.FAMILIES)


def text(length: int = 40) -> models.Inputs:
    ids = torch.randint(3, 100, (2, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@every_family
def test_identity(family: str) -> None:
    teacher = models.FAMILIES[family]().cuda()
    student = copy.deepcopy(teacher)
    bridges.replace_attention(student, "attention")
    inputs = text()
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close("logits", teacher(**inputs).logits[seen], student(**inputs).logits[seen], 1e-5)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(teacher.generate(**inputs, **settings), student.generate(**inputs, **settings))


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["attention", "random"])
def test_nothing_is_left_on_the_cpu(family: str, dtype: torch.dtype, init: Any) -> None:
    """When a model is converted where it stands, cast, or copied."""
    model = models.FAMILIES[family]().cuda().to(dtype)
    bridges.replace_attention(model, "mmate", init=init)
    for step in (lambda m: m, lambda m: m.to(torch.bfloat16), copy.deepcopy):
        model = step(model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tensor.is_cuda, name


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation(family: str, dtype: torch.dtype) -> None:
    student = models.FAMILIES[family]().cuda().to(dtype)
    bridges.replace_attention(student, "mmate")
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    inputs = text()
    cached = student.generate(**inputs, **settings)
    plain = student.generate(**inputs, **settings, use_cache=False)
    first = 1 if dtype == torch.bfloat16 else 8  # in bf16 near ties may part after the first token
    for a, b in zip(plain.logits[:first], cached.logits[:first]):
        assert_close("logits", a.float(), b.float(), 1e-5 if dtype == torch.float32 else 3e-2)
    assert bridges.state_bytes(cached.past_key_values) > 0


@every_family
def test_training_step_in_bf16(family: str) -> None:
    student = models.FAMILIES[family]().cuda()
    bridges.replace_attention(student, "mmate")
    inputs = text()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        student.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [n for n, p in student.named_parameters() if ".mixer." in n and p.grad is None]
    assert not [n for n in missing if "backward_decay" not in n]  # text alone has no backward scan
