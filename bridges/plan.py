"""What a conversion will do, layer by layer, before anything is touched; and its printed report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from bridges.attention import MixerAttention
from bridges.dropped import dropped
from bridges.errors import (
    AlreadyConvertedError,
    AssumedFamilyWarning,
    BridgeError,
    UnsupportedAttentionError,
    warn_once,
)
from bridges.families import Family, family_for
from bridges.patterns import Spec, resolve
from bridges.transfer import Transfer, transfers
from mixers import ConfigError, MixerConfig, TokenMixer, get
from mixers.attention import Attention

Init = Literal["attention", "random"]
SHAPE_FIELDS = ("dim", "num_heads", "num_kv_heads", "head_dim", "qkv_bias", "out_bias", "qk_norm")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's conversion.

    Attributes:
        index: Decoder layer.
        mixer: Registered name of the mixer.
        config: Its settings, complete.
        transfers: What happens to each weight.
        state_bytes: Bytes of one sequence's state; None where it grows with the sequence.
    """

    index: int
    mixer: str
    config: MixerConfig
    transfers: tuple[Transfer, ...]
    state_bytes: int | None


@dataclass(frozen=True)
class Report:
    """A conversion, planned or done; ``print`` it.

    Attributes:
        model_class: Name of the model's class.
        family: ``config.model_type`` of the model.
        init: Where the mixers' projections come from.
        layers: One entry a converted layer.
        kept_layers: Indices of the layers whose attention stays.
        assumed: What was taken for granted of a model that no family lists.
    """

    model_class: str
    family: str
    init: Init
    layers: tuple[LayerPlan, ...]
    kept_layers: tuple[int, ...]
    assumed: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int | None:
        """Bytes that decoding keeps for one sequence in the converted layers; None if it grows."""
        sizes = [layer.state_bytes for layer in self.layers]
        return None if None in sizes else sum(s for s in sizes if s is not None)

    def __str__(self) -> str:
        table = Table(title=f"{self.model_class}: {len(self.layers)} layers converted", title_justify="left")
        for column in ("layers", "mixer", "what", "weights"):
            table.add_column(column, overflow="fold")
        for indices, layer in _alike(self.layers):
            for row, action in enumerate(dict.fromkeys(t.action for t in layer.transfers)):
                weights = ", ".join(str(t) for t in layer.transfers if t.action == action)
                table.add_row(*((indices, layer.mixer) if row == 0 else ("", "")), action, weights)
            table.add_section()
        if self.kept_layers:
            table.add_row(_ranges(list(self.kept_layers)), "(teacher's attention)", "kept", "all")
        size = self.state_bytes
        kept = (
            "grows with the sequence" if size is None else f"{size:,} bytes a sequence, whatever its length"
        )
        console = Console(width=110, record=True, file=None, quiet=False, force_terminal=False)
        with console.capture() as captured:
            console.print(table)
            console.print(f"Decoding state of the converted layers: {kept}.", highlight=False)
            if self.assumed:
                console.print(f"assumed: {'; '.join(self.assumed)}.", highlight=False, markup=False)
        return captured.get().rstrip()


def plan(
    model: PreTrainedModel,
    spec: Spec = "mmate",
    *,
    layers: str | int | Iterable[int] = "all",
    init: Init = "attention",
    **config: Any,
) -> Report:
    """Say what :func:`replace_attention` would do with the same arguments, without touching the model.

    Args:
        model: A Hugging Face model with a decoder.
        spec: A mixer name, or ``{layer pattern: mixer}``, e.g. ``{"*": "mmate", "0,-1": "attention"}``.
        layers: Layers that ``"*"`` may convert: ``"all"``, a pattern such as ``"0,4-7"``, or indices.
        init: Projections are the teacher's (``"attention"``) or fresh (``"random"``).
        **config: Fields of the mixer's config.

    Returns:
        The plan.

    Raises:
        UnknownFamilyError: The model is of no known family, or its attention is not of its pattern.
        AlreadyConvertedError: The model is converted already, or wrapped by peft.
        LayerPatternError: A pattern is malformed or names no layer.
        UnsupportedAttentionError: The attention cannot be carried by the mixer asked for.
        mixers.UnknownMixerError: No such mixer.
        mixers.ConfigError: Unknown field, bad value, or a shape that is not the teacher's.
    """
    family, attentions = find_attention(model)
    if init not in ("attention", "random"):
        raise BridgeError(f"init must be 'attention' or 'random', found {init!r}.")
    text_config = model.config.get_text_config(decoder=True)
    chosen = resolve(spec, layers, len(attentions), config)
    for index in chosen:
        _check_weights(index, attentions[index])
    family.check(model, [attentions[index] for index in chosen])
    rows = []
    for index, (name, settings) in chosen.items():
        attention = attentions[index]
        cls = get(name)
        teachers = family.mixer_fields(attention, text_config)
        twins = family.twin_fields(attention) if issubclass(cls, Attention) else {}
        full = cls.config_class.from_dict({**teachers, **twins, **settings})
        _check_shape(full, teachers)
        with torch.device("meta"):
            mixer = cls(full, projections=init == "random")
        done = transfers(mixer, attention, family, init, dropped(mixer, attention, family))
        rows.append(LayerPlan(index, name, full, tuple(done), _state_bytes(mixer, attention)))
    kept = tuple(i for i in range(len(attentions)) if i not in chosen)
    if family.assumed:
        warn_once(
            f"no family lists {type(model).__name__} (model_type {model.config.model_type!r}); assumed: "
            f"{'; '.join(family.assumed)}. Make sure by replace_attention(copy, 'attention'), which has to give the "
            "model's own logits (docs: add a model family).",
            AssumedFamilyWarning,
            3,
        )
    return Report(type(model).__name__, model.config.model_type, init, tuple(rows), kept, family.assumed)


def find_attention(model: nn.Module) -> tuple[Family, list[nn.Module]]:
    """Return the model's family and the attention module of each decoder layer.

    Raises:
        AlreadyConvertedError: The model is converted already, or wrapped by peft.
        UnknownFamilyError: The model is of no known family.
    """
    if hasattr(model, "peft_config"):
        raise AlreadyConvertedError(
            "the model is wrapped by peft; convert the base model first, or merge_and_unload() the adapters."
        )
    if not isinstance(model, PreTrainedModel):
        raise BridgeError(f"replace_attention needs a transformers model, found {type(model).__name__}.")
    family = family_for(model)
    attentions = [family.attention(layer) for layer in family.layers(model)]
    converted = [i for i, a in enumerate(attentions) if isinstance(a, MixerAttention)]
    if converted:
        raise AlreadyConvertedError(
            f"layers {_ranges(converted)} are converted already; start from the teacher, once, with a spec "
            "such as {'*': 'mmate', '0': 'attention'} for all layers."
        )
    return family, attentions


def _check_weights(index: int, attention: nn.Module) -> None:
    for name, parameter in attention.named_parameters():
        if not parameter.is_floating_point():
            raise UnsupportedAttentionError(
                f"{name} of layer {index} is {parameter.dtype}: the model is quantised; load it in a floating-point "
                "type, and quantise the converted model if you need to."
            )


def _check_shape(config: MixerConfig, teachers: Mapping[str, Any]) -> None:
    """Refuse settings that contradict the teacher's projections, which the mixer gets."""
    for field in SHAPE_FIELDS:
        found, wanted = getattr(config, field), teachers.get(field, getattr(MixerConfig, field, None))
        if found != wanted:
            raise ConfigError(
                f"{field} is {wanted!r} in the teacher, found {found!r} in the settings; leave it out, it is read "
                "from the model."
            )


def _state_bytes(mixer: TokenMixer, attention: nn.Module) -> int | None:
    if any(isinstance(part, Attention) for part in mixer.modules()):
        return None
    state = mixer.init_state(1, next(attention.parameters()).dtype, "meta")
    return sum(t.numel() * t.element_size() for t in state.values())


def _alike(layers: Iterable[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """Group layers that are treated alike: (their indices, one of them)."""
    groups: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        key: Mapping[str, Any] = {**layer.config.to_dict(), "layer_idx": None}
        groups.setdefault((layer.mixer, repr(key), layer.transfers), []).append(layer)
    return [(_ranges([m.index for m in members]), members[0]) for members in groups.values()]


def _ranges(indices: list[int]) -> str:
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)
