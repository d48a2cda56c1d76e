"""GPT-2: transposed projections, those of queries, keys and values fused; learned positions, no rotary."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bridges.families.family import Family, register_family
from bridges.families.fused import linear, split_rows


@register_family("gpt2")
class GPT2(Family):
    """``GPT2LMHeadModel``."""

    attention_name = "attn"
    weights = ("c_attn", "c_proj")

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the blocks; see :meth:`Family.layers`."""
        return list(model.get_decoder().h)

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Transpose ``c_attn`` and ``c_proj``, and split the former; see :meth:`Family.projections`."""
        fused, out = attention.c_attn, attention.c_proj
        widths, trains = [attention.embed_dim] * 3, fused.weight.requires_grad
        q, k, v = split_rows(fused.weight.t(), fused.bias, *widths, trains=trains)
        o = linear(out.weight.t(), out.bias, trains=out.weight.requires_grad)
        return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}

    def dropouts(self, attention: Any) -> list[str]:
        """Name the dropout of weights and outputs; see :meth:`Family.dropouts`."""
        rates = {"attention": attention.attn_dropout.p, "residual": attention.resid_dropout.p}
        return [f"{name} dropout of {rate}" for name, rate in rates.items() if rate]
