"""The identity bridge: a teacher whose attention is replaced by its twin gives what it gave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _device
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2_5_VLForConditionalGeneration,
)

import bridges
from bridges.families import family_of
from tests.bridges import models
from tests.bridges.test_plan import sliding_teacher
from tests.helpers import assert_close

SPECS: dict[str, Any] = {"all": "attention", "first": {"0": "attention"}, "last": {"-1": "attention"}}


@pytest.fixture(scope="module", params=models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=SPECS)
def pair(request: pytest.FixtureRequest, family: str) -> tuple[Any, Any]:
    """A teacher and its twin with some layers or all replaced."""
    return models.teacher(family), models.converted(family, SPECS[request.param])


def test_logits_are_bit_equal_without_padding(family: str, pair: tuple[Any, Any]) -> None:
    inputs = models.batch(family, padded=False)
    ours, theirs = (models.logits(model, inputs) for model in reversed(pair))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(family: str, pair: tuple[Any, Any], side: str) -> None:
    if family == "qwen2_5_vl":
        inputs = models.vision_batch(models.MIXED_ROW, models.TWO_IMAGES_ROW, [5, 6, 7], side=side)
    else:
        inputs = models.text_batch(rows=3, pads=(0, 5, 17), side=side)
    theirs, ours = (models.at_tokens(models.logits(model, inputs), inputs) for model in pair)
    assert_close("logits", theirs, ours, 1e-5)


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of all weights, those of projections by one name however they are held."""
    layers = bridges.attention_layers(model)
    found = {n: p.grad for n, p in model.named_parameters() if ".mixer." not in n}
    for index, layer in layers.items():
        if isinstance(layer, bridges.MixerAttention):
            found |= {f"{index}.{n}": p.grad for n, p in layer.mixer.named_parameters()}
            continue
        for parameter in layer.parameters():
            parameter.data = parameter.grad
        for name, part in family_of(model.config.model_type).projections(layer).items():
            found |= {f"{index}.{name}.{n}": p.data for n, p in part.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def test_loss_and_its_gradients(family: str, pair: tuple[Any, Any]) -> None:
    inputs = models.batch(family)
    weights = []
    for model in copy.deepcopy(pair):
        model.train()
        model(**inputs, labels=models.labels(inputs)).loss.backward()
        weights.append(gradients(model))
    theirs, ours = weights
    assert {name for name in theirs if name[0].isdigit()} <= ours.keys() <= theirs.keys()
    for name, gradient in ours.items():
        if ".k_proj.bias" not in name:  # its gradient is zero: softmax ignores a shift
            assert_close(name, theirs[name], gradient, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_what_is_generated(family: str, pair: tuple[Any, Any], settings: dict[str, Any]) -> None:
    sequences = []
    for model in pair:
        torch.manual_seed(0)
        sequences.append(models.generate(model, models.batch(family), **settings))
    assert torch.equal(*sequences)


def test_logits_while_decoding(family: str, pair: tuple[Any, Any]) -> None:
    outputs = [
        models.generate(model, models.batch(family), return_dict_in_generate=True, output_logits=True)
        for model in pair
    ]
    theirs, ours = (torch.stack(out.logits) for out in outputs)
    assert_close("logits", theirs, ours, 1e-5)


@pytest.mark.parametrize(
    "spec", ["attention", {"0": {"mixer": "sliding_window", "window": 6}, "1": "attention"}]
)
def test_sliding_window_layers_have_a_twin_too(spec: Any) -> None:
    teacher = sliding_teacher()
    student, inputs = models.converted(teacher, spec), models.text_batch(length=30)
    theirs, ours = (models.at_tokens(models.logits(m, inputs), inputs) for m in (teacher, student))
    assert_close("logits", theirs, ours, 1e-5)
    assert torch.equal(models.generate(teacher, inputs), models.generate(student, inputs))


@pytest.mark.parametrize("kept", [0, 1])
def test_sliding_window_layers_may_stay(kept: int) -> None:
    teacher = sliding_teacher()
    spec = {"0": {"mixer": "sliding_window", "window": 6}} if kept == 1 else {"1": "attention"}
    student, inputs = models.converted(teacher, spec), models.text_batch(length=30)
    for settings in ({}, {"cache_implementation": "static"}):
        theirs, ours = (models.generate(m, inputs, **settings) for m in (teacher, student))
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_teachers_dtype_is_kept(dtype: torch.dtype) -> None:
    teacher = models.teacher("qwen2_5_vl").to(dtype)
    student, inputs = models.converted(teacher, "attention"), models.batch("qwen2_5_vl")
    theirs, ours = (models.at_tokens(models.logits(m, inputs), inputs) for m in (teacher, student))
    assert ours.dtype == dtype
    assert_close("logits", theirs, ours, 1e-2 if dtype == torch.bfloat16 else 1e-12)
    linear = models.converted(teacher, "mmate")
    assert {p.dtype for n, p in linear.named_parameters() if "rates" not in n} == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for n, p in linear.named_parameters() if "rates" in n} <= {torch.float32, wide}
    assert models.logits(linear, inputs).dtype == dtype


def test_the_model_stays_of_its_class() -> None:
    model = models.converted("qwen2_5_vl")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.config.model_type == "qwen2_5_vl"
    assert not model.training


def test_another_model_of_the_same_config_is_not_touched() -> None:
    config = LlamaConfig(**models.text_fields())
    teacher, student = (models.ready(LlamaForCausalLM(config)) for _ in range(2))
    inputs = models.text_batch()
    before, fields = models.logits(teacher, inputs), config.to_dict()
    bridges.replace_attention(student, "mmate")
    assert torch.equal(models.logits(teacher, inputs), before)
    assert teacher.config is config
    assert config.to_dict() == fields


def test_a_copy_of_a_converted_model_is_its_own() -> None:
    model, inputs = models.converted("qwen2_5_vl"), models.batch("qwen2_5_vl")
    twin = copy.deepcopy(model)
    before = models.logits(model, inputs)
    assert torch.equal(models.logits(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    del twin
    assert torch.equal(models.logits(model, inputs), before)


def test_base_models_and_other_heads_convert() -> None:
    inputs = models.text_batch()
    for cls in (LlamaModel, LlamaForSequenceClassification):
        torch.manual_seed(0)
        teacher = models.shake(cls(LlamaConfig(**models.text_fields()))).eval()
        student = models.converted(teacher, "attention")
        with torch.no_grad():
            theirs, ours = (model(**inputs)[0] for model in (teacher, student))
        if cls is LlamaModel:
            theirs, ours = models.at_tokens(theirs, inputs), models.at_tokens(ours, inputs)
        assert_close(cls.__name__, theirs, ours, 1e-5)


def test_attention_layers_finds_them_before_and_after() -> None:
    model = models.teacher("qwen2_5_vl")
    assert list(bridges.attention_layers(model)) == [0, 1]
    bridges.replace_attention(model, {"1": "mmate"})
    kinds = {i: isinstance(a, bridges.MixerAttention) for i, a in bridges.attention_layers(model).items()}
    assert kinds == {0: False, 1: True}


def test_new_weights_stand_where_a_loaded_model_does(tmp_path: Path) -> None:
    """Meta stands for a GPU. While transformers loads, factory functions of torch are not what they were."""
    models.teacher("llama").save_pretrained(tmp_path)
    _device._device_constructors.cache_clear()  # as in a process that has made nothing on a device yet
    try:
        model = LlamaForCausalLM.from_pretrained(tmp_path).to("meta")
        bridges.replace_attention(model, "mmate")
    finally:
        _device._device_constructors.cache_clear()
    assert not [name for name, p in model.named_parameters() if not p.is_meta]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_twins_weigh_as_the_models_own_attention_does(family: str) -> None:
    """Against what transformers tells of its eager attention, and with the model left as it was."""
    teacher = models.teacher(family)
    inputs = models.batch(family)
    passed: dict[int, Any] = {}
    student = models.converted(family, "attention")
    for index, layer in bridges.attention_layers(student).items():
        layer.register_forward_pre_hook(
            lambda m, a, k, index=index: passed.update({index: (a, k)}), with_kwargs=True
        )
    with torch.no_grad():
        student(**inputs, use_cache=False)
        twins = bridges.attention_twins(teacher)
        teacher.set_attn_implementation("eager")
        told = teacher(**inputs, use_cache=False, output_attentions=True).attentions
        valid = inputs["attention_mask"].bool()
        every = torch.arange(valid.shape[1]).expand(len(valid), -1)
        for index, weights in enumerate(told):
            args, kwargs = passed[index]
            found = twins[index].attention_weights(every, *args, **kwargs)
            assert_close(f"layer {index}", weights.transpose(1, 2)[valid], found.transpose(1, 2)[valid], 1e-5)
    assert not any(
        isinstance(layer, bridges.MixerAttention) for layer in bridges.attention_layers(teacher).values()
    )
