"""What a model family has to say about itself, and the registry of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.errors import UnknownFamilyError, UnsupportedAttentionError
from mixers import MixerConfig
from mixers.errors import near

F = TypeVar("F", bound=type["Family"])
_FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Clips:
    """Where vision stands in a batch.

    Attributes:
        clip: int [B, N], clip number within its row, -1 at text.
        coords: int [B, N, 3], (t, h, w) of vision tokens.
    """

    clip: Tensor
    coords: Tensor


class Family:
    """The common pattern of a Hugging Face decoder; a family overrides what differs.

    The pattern: ``model.get_decoder().layers[i].self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``
    and ``o_proj``, rotary embedding given as ``position_embeddings`` in the rotate-half convention.
    """

    attention_name = "self_attn"
    adopted = ("q_proj", "k_proj", "v_proj", "o_proj")

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the decoder layers, in order."""
        decoder = model.get_decoder()
        if decoder is None or not hasattr(decoder, "layers"):
            raise UnknownFamilyError(
                f"{type(model).__name__} has no get_decoder().layers; describe where its layers are in a "
                "family (docs: add a model family)."
            )
        return list(decoder.layers)

    def attention(self, layer: nn.Module) -> Any:
        """Return the self-attention module of a layer."""
        return getattr(layer, self.attention_name)

    def mixer_fields(self, attention: Any, text_config: Any) -> dict[str, Any]:
        """Return the fields of :class:`mixers.MixerConfig` that reproduce this attention.

        Raises:
            UnknownFamilyError: A projection is not where the pattern expects it.
        """
        missing = [name for name in self.adopted if not hasattr(attention, name)]
        if missing:
            raise UnknownFamilyError(
                f"{type(attention).__name__} has no {', '.join(missing)}; its submodules are "
                f"{', '.join(name for name, _ in attention.named_children()) or 'none'}. A family "
                "must say how its projections are laid out (docs: add a model family)."
            )
        head_dim = attention.head_dim
        return {
            "dim": text_config.hidden_size,
            "num_heads": attention.q_proj.out_features // head_dim,
            "num_kv_heads": attention.k_proj.out_features // head_dim,
            "head_dim": head_dim,
            "layer_idx": attention.layer_idx,
            "qkv_bias": attention.q_proj.bias is not None,
            "out_bias": attention.o_proj.bias is not None,
            "scale": float(attention.scaling),
        }

    def dropped(self, attention: Any, config: MixerConfig, mixer: str) -> list[str]:
        """Name what this attention does or holds that a mixer of that name and config will not.

        Raises:
            UnsupportedAttentionError: The mixer would silently be another function than it claims.
        """
        dropped = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in self.adopted]
        window = getattr(attention, "sliding_window", None)
        if window is not None and not (
            mixer == "sliding_window" and getattr(config, "window", None) == window
        ):
            if mixer == "attention":
                raise UnsupportedAttentionError(
                    f"layer {attention.layer_idx} attends within a sliding window of {window} tokens, which "
                    "the mixer 'attention' does not; use 'sliding_window' with window="
                    f"{window} for this layer, or leave it out by layers=."
                )
            dropped.append(f"sliding window of {window}")
        if getattr(attention, "attention_dropout", 0.0):
            dropped.append(f"attention dropout of {attention.attention_dropout}")
        return dropped

    def clips(self, config: Any, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> Clips | None:
        """Find the vision tokens of a batch.

        Args:
            config: The model's config.
            input_ids: [B, N], the whole prompt; None where only embeddings are given.
            inputs: The other keyword arguments of the model's forward or of ``generate``.

        Returns:
            Where vision stands; None if there is none, or the family has none.

        Raises:
            LayoutCaptureError: Tokens and grids do not match, or there are grids but no tokens.
        """
        return None


def register_family(*model_types: str) -> Any:
    """Class decorator that makes a family serve the models whose ``config.model_type`` is one of these."""

    def decorate(cls: F) -> F:
        for model_type in model_types:
            _FAMILIES[model_type] = cls()
        return cls

    return decorate


def families() -> list[str]:
    """List the ``config.model_type`` values that some family serves."""
    return sorted(_FAMILIES)


def family_of(model_type: str) -> Family:
    """Return the family of a ``config.model_type``.

    Raises:
        UnknownFamilyError: None serves it; near names are listed.
    """
    if model_type not in _FAMILIES:
        raise UnknownFamilyError(
            f"no family serves model_type {model_type!r}.{near(model_type, _FAMILIES)} Known: "
            f"{', '.join(families())}. Describe it in a family (docs: add a model family)."
        )
    return _FAMILIES[model_type]
