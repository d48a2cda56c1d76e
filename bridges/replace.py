"""Put token mixers where a pretrained model has self-attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bridges.attention import MixerAttention, rotary_sections
from bridges.families import Family, family_for
from bridges.patterns import Spec
from bridges.plan import Init, LayerPlan, Report, find_attention, plan
from bridges.pretrained import become_converted
from bridges.record import surgery_record, teacher_name
from bridges.transfer import adopt_projections
from mixers import get


def replace_attention(
    model: PreTrainedModel,
    spec: Spec = "mmate",
    *,
    layers: str | int | Iterable[int] = "all",
    init: Init = "attention",
    **config: Any,
) -> Report:
    """Replace self-attention by token mixers, in place.

    The model stays a Hugging Face model: ``forward``, ``generate`` with a cache of constant size,
    ``save_pretrained``, gradient checkpointing, peft. All checks run before the first change, so a
    refused model is left as it was.

    Args:
        model: A Hugging Face model with a decoder, of a known family.
        spec: A mixer name, or ``{layer pattern: mixer}``, e.g. ``{"*": "mmate", "0,-1": "attention"}``.
        layers: Layers that ``"*"`` may convert: ``"all"``, a pattern such as ``"0,4-7"``, or indices.
        init: Projections are the teacher's (``"attention"``) or fresh (``"random"``).
        **config: Fields of the mixer's config; ``mixers.describe`` lists them.

    Returns:
        The report: for each layer, which weights were kept, copied, initialised and dropped.

    Raises:
        BridgeError: As :func:`plan` says.
        mixers.MixerError: As :func:`plan` says.
    """
    report = plan(model, spec, layers=layers, init=init, **config)
    family, attentions = find_attention(model)
    record = surgery_record(report, len(attentions), teacher_name(model))
    decoder_layers = family.layers(model)
    sections = _sections(model)
    for row in report.layers:  # one at a time, so that no more than one layer's weights are held twice
        built = _build(row, attentions[row.index], family, init, sections)
        setattr(decoder_layers[row.index], family.attention_name, built)
        attentions[row.index] = built
    become_converted(model, family, record)
    return report


def attention_twins(model: PreTrainedModel) -> dict[int, MixerAttention]:
    """Return decoder layer index → an ``attention`` mixer that does what the layer's attention does.

    The model is not changed. The twins hold its own projections, or parts of fused ones, and can tell their
    attention weights, which a model's own attention does not keep.

    Args:
        model: A Hugging Face model that is not converted.

    Raises:
        BridgeError: As :func:`plan` says.
    """
    report = plan(model, "attention")
    family, attentions = find_attention(model)
    sections = _sections(model)
    return {
        row.index: _build(row, attentions[row.index], family, report.init, sections) for row in report.layers
    }


def attention_layers(model: Any) -> dict[int, nn.Module]:
    """Return decoder layer index → its attention module, converted or not.

    Args:
        model: A Hugging Face model, a converted one, or either wrapped by peft.

    Raises:
        UnknownFamilyError: The model is of no known family.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_for(base)
    return {i: family.attention(layer) for i, layer in enumerate(family.layers(base))}


def _sections(model: PreTrainedModel) -> tuple[int, ...]:
    return rotary_sections(model.config.get_text_config(decoder=True))


def _build(
    row: LayerPlan, attention: nn.Module, family: Family, init: Init, sections: tuple[int, ...]
) -> MixerAttention:
    weight = next(attention.parameters())
    with torch.device(weight.device):
        mixer = get(row.mixer)(copy.deepcopy(row.config), projections=init == "random")
    mixer = mixer.to(weight.device, weight.dtype)
    if init == "attention":
        adopt_projections(mixer, attention, family)
    mixer.train(attention.training)
    return MixerAttention(mixer, row.index, sections)
