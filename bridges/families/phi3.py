"""Phi-3 and Phi-4: one fused projection for queries, keys and values; rotary may turn part of a head."""

from __future__ import annotations

from typing import Any

from torch import nn

from bridges.families.family import Family, register_family
from bridges.families.fused import split_rows


@register_family("phi3")
class Phi3(Family):
    """``Phi3ForCausalLM``."""

    weights = ("qkv_proj", "o_proj")

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Split the rows of ``qkv_proj``; see :meth:`Family.projections`."""
        config, fused = attention.config, attention.qkv_proj
        width = config.num_attention_heads * attention.head_dim
        kv_width = config.num_key_value_heads * attention.head_dim
        trains = fused.weight.requires_grad
        q, k, v = split_rows(fused.weight, fused.bias, width, kv_width, kv_width, trains=trains)
        return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": attention.o_proj}
