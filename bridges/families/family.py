"""What a model family has to say about itself, and the registry of families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.errors import UnknownFamilyError, UnsupportedAttentionError
from mixers import TokenMixer
from mixers.errors import near

F = TypeVar("F", bound=type["Family"])
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
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

    The pattern: ``model.get_decoder().layers[i].self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj`` and perhaps ``q_norm`` and ``k_norm``, rotary embedding given as ``position_embeddings``
    in the rotate-half convention.

    Attributes:
        attention_name: Name of the attention module in its layer.
        weights: Names of the attention's submodules whose weights go over into the projections.
        assumed: What was taken for granted, for a model that no family lists.
    """

    attention_name = "self_attn"
    weights: tuple[str, ...] = (*PROJECTIONS, *NORMS)
    assumed: tuple[str, ...] = ()

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

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Return ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, and ``q_norm`` and ``k_norm`` where there are such.

        They are the attention's own modules where it has them. Where it holds them fused or transposed they
        are views of its weights, see :func:`~bridges.families.fused.linear`, copied when a mixer adopts them.

        Raises:
            UnknownFamilyError: A projection is not where the pattern expects it.
        """
        missing = [name for name in PROJECTIONS if not isinstance(getattr(attention, name, None), nn.Module)]
        if missing:
            raise UnknownFamilyError(
                f"{type(attention).__name__} has no {', '.join(missing)}; its submodules are "
                f"{', '.join(name for name, _ in attention.named_children()) or 'none'}. A family "
                "must say how its projections are laid out (docs: add a model family)."
            )
        norms = [name for name in NORMS if isinstance(getattr(attention, name, None), nn.Module)]
        return {name: getattr(attention, name) for name in (*PROJECTIONS, *norms)}

    def mixer_fields(self, attention: Any, text_config: Any) -> dict[str, Any]:
        """Return the fields of :class:`mixers.MixerConfig` that reproduce this attention.

        Raises:
            UnknownFamilyError: A projection is not where the pattern expects it, or of another width.
            UnsupportedAttentionError: Queries and keys are normed as no mixer does.
        """
        parts: dict[str, Any] = self.projections(attention)
        head_dim = self.head_dim(attention)
        _check_widths(attention, parts, head_dim)
        return {
            "dim": text_config.hidden_size,
            "num_heads": parts["q_proj"].out_features // head_dim,
            "num_kv_heads": parts["k_proj"].out_features // head_dim,
            "head_dim": head_dim,
            "layer_idx": attention.layer_idx,
            "qkv_bias": parts["q_proj"].bias is not None,
            "out_bias": parts["o_proj"].bias is not None,
            "scale": self.scale(attention),
            "softcap": self.softcap(attention),
            **_norm_fields(parts, head_dim),
        }

    def head_dim(self, attention: Any) -> int:
        """Return the width of a head."""
        return attention.head_dim

    def scale(self, attention: Any) -> float:
        """Return the factor on query·key."""
        return float(attention.scaling)

    def window(self, attention: Any) -> int | None:
        """Return how many tokens a query looks back at, itself included; None: at all.

        Where layers differ they hold it themselves, else their config does.
        """
        config = getattr(attention, "config", None)
        return getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or None

    def softcap(self, attention: Any) -> float | None:
        """Return the bound that this attention bends its scores to; None: there is none."""
        return getattr(attention, "attn_logit_softcapping", None)

    def twin_fields(self, attention: Any) -> dict[str, Any]:
        """Return the fields that :class:`mixers.attention.AttentionConfig` adds, for the teacher's exact twin."""
        return {"window": self.window(attention)}

    def dropped(self, attention: Any, mixer: TokenMixer) -> list[str]:
        """Name what else this attention does that a mixer will not; the twin ``attention`` is then refused."""
        return []

    def check(self, model: PreTrainedModel, attentions: Sequence[Any]) -> None:
        """Raise UnknownFamilyError where what is assumed of these attention modules is found wrong."""

    def dropouts(self, attention: Any) -> list[str]:
        """Name the dropout inside of this attention, which no mixer has."""
        rate = getattr(attention, "attention_dropout", 0.0)
        return [f"attention dropout of {rate}"] if rate else []

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


def _check_widths(attention: Any, parts: Mapping[str, Any], head_dim: int) -> None:
    """Refuse projections whose widths are not those of heads of one width each."""
    q, k, v = (parts[name].out_features for name in ("q_proj", "k_proj", "v_proj"))
    out = parts["o_proj"].in_features
    if k != v or q != out or q % head_dim or k % head_dim or q % k:
        raise UnknownFamilyError(
            f"{type(attention).__name__} projects to {q}, {k} and {v} and back from {out}, which are not H, G and G "
            f"heads of {head_dim} and back from H; a family must say what they hold (docs: add a model family)."
        )


def _norm_fields(parts: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Say whether each head or the full width is normed, from the widths of the norms."""
    if "q_norm" not in parts:
        return {"qk_norm": "none"}
    widths = {
        "head": (head_dim, head_dim),
        "full": (parts["q_proj"].out_features, parts["k_proj"].out_features),
    }
    weights = [getattr(parts[name], "weight", None) for name in NORMS if name in parts]
    shapes = [None if weight is None else tuple(weight.shape) for weight in weights]
    for kind, (query, key) in widths.items():
        if shapes == [(query,), (key,)]:
            norm = parts["q_norm"]
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            return {"qk_norm": kind} | ({} if eps is None else {"norm_eps": float(eps)})
    raise UnsupportedAttentionError(
        f"the norms of queries and keys have weights of {' and '.join(map(str, shapes))}; mixers norm "
        f"each head ({head_dim}) or the full width ({', '.join(map(str, widths['full']))})."
    )


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
