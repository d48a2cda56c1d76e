from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

import bridges
from bridges.families import family, family_of
from tests.bridges import models
from tests.helpers import assert_close


@pytest.fixture
def olmo() -> Iterator[type[bridges.Family]]:
    """A family that a user adds, gone again after the test."""

    @bridges.register_family("olmo")
    class Olmo(bridges.Family):
        pass

    yield Olmo
    del family._FAMILIES["olmo"]


def test_the_families_are_listed() -> None:
    assert set(models.FAMILIES) <= set(bridges.families())
    assert bridges.families() == sorted(bridges.families())


def test_an_unknown_one_is_refused_with_near_names() -> None:
    with pytest.raises(bridges.UnknownFamilyError, match=r"'qwen2_5_vl'"):
        family_of("qwen2_5_vll")


def test_a_family_is_a_small_file(olmo: type[bridges.Family]) -> None:
    """The common pattern serves another Llama-like model without a line."""
    teacher = models.ready(OlmoForCausalLM(OlmoConfig(**models.text_fields())))
    student, inputs = models.converted(teacher, "attention"), models.text_batch()
    theirs, ours = (models.at_tokens(models.logits(m, inputs), inputs) for m in (teacher, student))
    assert_close("logits", theirs, ours, 1e-5)
    assert torch.equal(models.generate(teacher, inputs), models.generate(student, inputs))
