"""A decoder that no family lists, described by what is found in it, and checked against itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.attention import LAYOUT_KWARG, MixerAttention
from bridges.errors import UnknownFamilyError, UnsupportedAttentionError
from bridges.families.family import NORMS, PROJECTIONS, Family, families, family_of
from bridges.families.gpt2 import GPT2
from bridges.families.gpt_neox import GPTNeoX
from bridges.families.phi3 import Phi3
from bridges.modes import evaluating
from mixers import Rotary, TokenLayout, TokenMixer
from mixers.attention import Attention, AttentionConfig

OUTPUTS = ("o_proj", "out_proj", "dense")
"""Names that the projection back to the model's width goes by."""

FUSED: tuple[Family, ...] = (Phi3(), GPT2(), GPTNeoX())
"""Families whose way to hold projections together others share."""

CROSS = ("cross_attn", "crossattention", "encoder_attn")
LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "q_a_proj")
CARRIED = ("sinks",)
"""Weights beside the projections that a mixer drops, as the report says."""

TOKENS = 6
"""Random tokens that a layer is checked on."""


def family_for(model: PreTrainedModel) -> Family:
    """Return the family that lists a model, or one that describes it by its structure.

    Args:
        model: A transformers model with a decoder, converted or not.

    Raises:
        UnknownFamilyError: The structure is not of a kind that can be described without a family.
        UnsupportedAttentionError: Its attention is of a kind that no mixer stands for.
    """
    model_type = model.config.model_type
    return family_of(model_type) if model_type in families() else Assumed(model)


class Assumed(Family):
    """The family of one model, by its structure: modules of one name in all layers, with known projections.

    Args:
        model: The model.

    Raises:
        UnknownFamilyError: No such modules are found.
        UnsupportedAttentionError: They are of a kind that no mixer stands for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._refuse_kinds(model)
        self.attention_name, layers = self._find(model)
        attention = next((a for a in map(self.attention, layers) if not isinstance(a, MixerAttention)), None)
        self._holder = next((f for f in FUSED if hasattr(attention, f.weights[0])), None)
        self._output = next((name for name in OUTPUTS if hasattr(attention, name)), "o_proj")
        self.weights = (*Family.weights, self._output) if self._holder is None else self._holder.weights
        names = ", ".join(name for name, _ in attention.named_children()) if attention is not None else ""
        self.assumed = (
            f"attention is {type(attention).__name__} at {self.attention_name}, its projections {names}",
            "causal softmax attention, with one factor on query·key",
            "rotary embedding, if any, in the rotate-half convention",
            "images and videos, if any, are read as text",
        )

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the decoder layers; see :meth:`Family.layers`."""
        return self._find(model)[1]

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Return them as they are, or parted as a listed family parts them; see :meth:`Family.projections`."""
        if self._holder is not None:
            return self._holder.projections(attention)
        parts = {name: getattr(attention, name) for name in PROJECTIONS[:3]}
        norms = {name: getattr(attention, name) for name in NORMS if hasattr(attention, name)}
        return {**parts, "o_proj": getattr(attention, self._output), **norms}

    def head_dim(self, attention: Any) -> int:
        """Return it from the attention, else from its config; see :meth:`Family.head_dim`."""
        for name in ("head_dim", "head_size"):
            if isinstance(getattr(attention, name, None), int):
                return getattr(attention, name)
        config = attention.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def scale(self, attention: Any) -> float:
        """Return it from the attention, else the usual one; see :meth:`Family.scale`."""
        return float(getattr(attention, "scaling", self.head_dim(attention) ** -0.5))

    def dropped(self, attention: Any, mixer: TokenMixer) -> list[str]:
        """Name a factor on the queries that is not constant; see :meth:`Family.dropped`."""
        rope = getattr(attention.config, "rope_parameters", None) or {}
        return ["query factor that grows with the position"] if rope.get("llama_4_scaling_beta") else []

    def check(self, model: PreTrainedModel, attentions: Sequence[Any]) -> None:
        """Compare each attention with its twin on a few random tokens; see :meth:`Family.check`."""
        text_config = model.config.get_text_config(decoder=True)
        twins = []
        for attention in attentions:
            held = {name.split(".")[0] for name, _ in attention.named_parameters()}
            beside = held - {*self.weights, *CARRIED}
            if beside:
                reason = f"{type(attention).__name__} has {', '.join(sorted(beside))} beside its projections"
                raise UnknownFamilyError(undescribed(model, reason))
            try:
                fields = {**self.mixer_fields(attention, text_config), **self.twin_fields(attention)}
                twins.append(Attention(AttentionConfig(**fields), projections=False))
                for name, module in self.projections(attention).items():
                    setattr(twins[-1], name, module)
            except (AttributeError, TypeError, RuntimeError) as error:
                raise UnknownFamilyError(undescribed(model, f"{error}")) from error
        if any(p.is_meta for p in model.get_decoder().parameters()):
            return
        for attention, twin, (x, rotary, theirs) in zip(attentions, twins, _listen(model, attentions)):
            if hasattr(attention, "sinks"):
                continue
            with torch.no_grad():
                ours = twin(x, None, rotary)
            distance = float((theirs - ours).abs().max() / theirs.abs().max())
            if not distance <= max(4 * torch.finfo(x.dtype).eps, 1e-4):
                reason = (
                    f"softmax attention by the weights of layer {attention.layer_idx} differs from the layer's own "
                    f"output by {distance:.1%}; its rotary embedding, its scale or the order of its heads is another"
                )
                raise UnknownFamilyError(undescribed(model, reason))

    def _find(self, model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
        """Return the name of the attention in each layer, and the layers."""
        decoder = model.get_decoder()
        for stack in [] if decoder is None else decoder.children():
            if not isinstance(stack, nn.ModuleList) or not len(stack):
                continue
            found = [
                [name for name, child in layer.named_children() if _is_attention(child)] for layer in stack
            ]
            if not any(found):
                continue
            bare = [str(i) for i, names in enumerate(found) if not names]
            if bare:
                kinds = sorted({type(child).__name__ for i in bare for child in stack[int(i)].children()})
                raise UnsupportedAttentionError(
                    f"{_name(model)} cannot be converted: its layers {', '.join(bare)} have no self-attention but "
                    f"{', '.join(kinds)}, so it is a hybrid already."
                )
            if {tuple(names) for names in found} == {tuple(found[0])} and len(found[0]) == 1:
                return found[0][0], list(stack)
        raise UnknownFamilyError(
            undescribed(
                model,
                "there is no list of layers in its decoder that has one module each with layer_idx and q_proj, "
                "k_proj, v_proj, or qkv_proj, c_attn or query_key_value",
            )
        )

    def _refuse_kinds(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        decoder = model.get_decoder()
        modules = list((decoder if decoder is not None else model).named_modules())
        names = {name.rsplit(".", 1)[-1] for name, _ in modules}
        kinds = set(getattr(config, "layer_types", None) or ())
        foreign = sorted(kinds - {"full_attention", "sliding_attention"})
        reason = None
        if model.config.is_encoder_decoder:
            reason = "it is an encoder and a decoder that attends to it; the library converts decoders alone"
        elif latent := sorted(names & set(LATENT)):
            reason = f"it has multi-head latent attention ({', '.join(latent)}), which has no keys and values of heads"
        elif getattr(config, "cross_attention_layers", None) or names & set(CROSS):
            reason = "some layers attend to another sequence (cross-attention)"
        elif getattr(config, "num_kv_shared_layers", 0) or any(
            hasattr(m, "is_kv_shared_layer") for _, m in modules
        ):
            reason = "layers share the keys and values of others"
        elif foreign:
            reason = f"it has layers of {', '.join(foreign)} already"
        elif any(_is_attention(m) and getattr(m, "is_causal", True) is False for _, m in modules):
            reason = "its tokens attend to later ones, and text must not"
        if reason is not None:
            raise UnsupportedAttentionError(f"{_name(model)} cannot be converted: {reason}.")


def undescribed(model: PreTrainedModel, reason: str) -> str:
    """Say why a model cannot be described by its structure, and what to write instead."""
    model_type = model.config.model_type
    return (
        f"no family lists {_name(model)}, and its structure does not describe it: {reason}. "
        "A descriptor of about 30 lines makes it convertible: subclass bridges.Family under "
        f"@bridges.register_family({model_type!r}) and override what differs from Llama: `layers` and "
        "`attention_name` (where attention stands), `projections` and `weights` (how it holds q, k, v and o), "
        "`head_dim`, `scale`, `window` and `softcap` (where their names differ), `dropped` (what no mixer does), "
        "`clips` (which tokens are vision). replace_attention(model, 'attention') then has to give the model's own "
        "logits (docs: Add a model family)."
    )


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def _is_attention(module: nn.Module) -> bool:
    if not hasattr(module, "layer_idx"):
        return False
    fused = any(hasattr(module, family.weights[0]) for family in FUSED)
    return fused or isinstance(module, MixerAttention) or all(hasattr(module, n) for n in PROJECTIONS[:3])


def _listen(model: PreTrainedModel, attentions: Sequence[Any]) -> list[tuple[Tensor, Rotary | None, Tensor]]:
    """Run the decoder on random tokens; return what each attention was given, with its rotary, and made of it."""
    heard: dict[int, tuple[Any, dict[str, Any], Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        heard[id(module)] = (args, kwargs, output)

    decoder, layout = model.get_decoder(), TokenLayout.text(1, TOKENS)
    weight = next(attentions[0].parameters())
    x = torch.randn(
        1, TOKENS, model.config.get_text_config(decoder=True).hidden_size, generator=torch.Generator()
    )
    hooks = [attention.register_forward_hook(note, with_kwargs=True) for attention in attentions]
    try:
        with evaluating(decoder), torch.no_grad():
            decoder(inputs_embeds=x.to(weight), use_cache=False, **{LAYOUT_KWARG: layout})
    except Exception as error:
        reason = f"it does not read embeddings as Llama's decoder does ({type(error).__name__}: {error})"
        raise UnknownFamilyError(undescribed(model, reason)) from error
    finally:
        for hook in hooks:
            hook.remove()
    results = []
    for attention in attentions:
        args, kwargs, output = heard.get(id(attention), ((), {}, None))
        if kwargs.get(LAYOUT_KWARG) is not layout:
            reason = (
                "its layers keep further arguments from attention, which could not learn where padding stands"
            )
            raise UnknownFamilyError(undescribed(model, reason))
        given = args[0] if args else kwargs["hidden_states"]
        results.append(
            (given, kwargs.get("position_embeddings"), output[0] if isinstance(output, tuple) else output)
        )
    return results
