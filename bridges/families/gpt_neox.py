"""GPT-NeoX and Pythia: one projection in which each head has its queries, keys and values side by side."""

from __future__ import annotations

from typing import Any

from torch import nn

from bridges.families.family import Family, register_family
from bridges.families.fused import linear


@register_family("gpt_neox")
class GPTNeoX(Family):
    """``GPTNeoXForCausalLM``."""

    attention_name = "attention"
    weights = ("query_key_value", "dense")

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Gather the heads' queries, keys and values, which no view can; see :meth:`Family.projections`."""

        def part(tensor: Any, kind: int) -> Any:
            heads = None if tensor is None else tensor.detach().unflatten(0, (-1, 3, attention.head_size))
            return None if heads is None else heads[:, kind].flatten(0, 1)

        fused = attention.query_key_value
        trains = fused.weight.requires_grad
        q, k, v = (
            linear(part(fused.weight, kind), part(fused.bias, kind), trains=trains) for kind in range(3)
        )
        return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": attention.dense}

    def head_dim(self, attention: Any) -> int:
        """Return the width of a head; see :meth:`Family.head_dim`."""
        return attention.head_size
