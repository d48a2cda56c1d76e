"""Nothing of size N × N is made, by mixers or by transformers around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from tests.bridges import models

LENGTH = 8192
WIDEST = LENGTH * models.VOCABULARY * 4
"""Bytes of the widest activation, the logits of all tokens; an N×N mask of bools has 16 times as many."""


class LargestStorage(TorchDispatchMode):
    """Remember the bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@contextmanager
def largest() -> Iterator[LargestStorage]:
    with torch.no_grad(), LargestStorage() as mode:
        yield mode


@pytest.fixture(scope="module", params=["mmate", "attention", "sliding_window"])
def model(request: pytest.FixtureRequest) -> Any:
    # Beside sinks the reference makes the scores of whole windows: at 256 as many bytes as an N×N mask of this length.
    settings = {"text_window": 32} if request.param == "mmate" else {}
    return models.converted(models.qwen2(num_hidden_layers=1), request.param, **settings)


def long_text(padded: bool) -> models.Inputs:
    return models.text_batch(rows=1, length=LENGTH, pads=(100 if padded else 0,))


def test_the_teacher_makes_one() -> None:
    """The measurement sees what it is to see."""
    with largest() as seen:
        models.qwen2(num_hidden_layers=1)(**models.text_batch(rows=1, length=2048, pads=(100,)))
    assert seen.bytes >= 2048 * 2048


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_forward(model: Any, padded: bool) -> None:
    with largest() as seen:
        model(**long_text(padded), use_cache=False)
    assert seen.bytes <= 4 * WIDEST


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_generate(model: Any, padded: bool) -> None:
    with largest() as seen:
        models.generate(model, long_text(padded), 2)
    assert seen.bytes <= 4 * WIDEST


def test_packed_rows(model: Any) -> None:
    positions = torch.arange(LENGTH) % 3000
    with largest() as seen:
        model(input_ids=long_text(False)["input_ids"], position_ids=positions[None], use_cache=False)
    assert seen.bytes <= 4 * WIDEST


def test_a_long_video() -> None:
    teacher = models.qwen2_5_vl(num_hidden_layers=1)
    model = models.converted(teacher, "mmate")
    row: list[models.Segment] = [models.START, ("video", (128, 16, 16)), models.END, 5]
    inputs = models.vision_batch(row, [1, 5])
    positions = torch.arange(inputs["input_ids"].shape[1])
    known = {name: table for name, table in inputs.items() if "pixel" not in name}
    embeddings = torch.randn(*inputs["input_ids"].shape, 64)
    with largest() as seen:
        model.model(**known, inputs_embeds=embeddings, position_ids=positions.expand(3, 2, -1))
    assert seen.bytes <= 4 * 2 * WIDEST


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_asked_for_brings_no_mask_back(implementation: str) -> None:
    model = models.converted("qwen2_5_vl")
    model.set_attn_implementation(implementation)
    assert model.config.text_config._attn_implementation == "linmu"
    assert model.config.vision_config._attn_implementation == implementation


def test_layers_that_stay_keep_their_implementation() -> None:
    model = models.converted("qwen2", {"0": "mmate"})
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_attention_that_is_left_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="choose 'sdpa'"):
        AttentionInterface()["linmu"]()
