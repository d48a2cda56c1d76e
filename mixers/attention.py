"""Causal softmax attention: the exact twin of the teacher's layer, and the identity bridge's mixer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.interface import MixerConfig, MixerState, Rotary, TokenMixer
from mixers.layout import TokenLayout
from mixers.registry import register
from mixers.rotary import apply_rotary

QUERIES_AT_ONCE = 512


@register("attention", config=MixerConfig)
class Attention(TokenMixer):
    """Softmax attention over all earlier tokens; O(N²) time, and a state that grows.

    Causal for text and vision alike, as decoders are trained. It exists to prove a bridge exact and
    to keep chosen layers as they were. No N×N mask is ever built: padded and packed rows are masked
    for a few queries at a time.
    """

    def mix_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
        state: MixerState | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see :meth:`TokenMixer.mix_heads`."""
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        valid, past = layout.valid, 0
        if state is not None:
            past = state["k"].shape[1]
            current = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
            k, v = (torch.cat([state[n].to(t.dtype), t], dim=1) for n, t in (("k", k), ("v", v)))
            valid = torch.cat([state["valid"], current], dim=1)
            state.update(k=k.detach(), v=v.detach(), valid=valid)
            if bool(valid.all()):
                valid = None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self._attend(q, k, v, valid, layout.sequence, past)
        return y.transpose(1, 2), None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, sequence: Tensor | None, past: int
    ) -> Tensor:
        gqa = self.num_heads != self.num_kv_heads
        length = q.shape[2]
        if valid is None and sequence is None and (past == 0 or length == 1):
            causal = past == 0 and length > 1
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=gqa)
        keys = torch.arange(past + length, device=q.device)
        outputs = []
        for start in range(0, length, QUERIES_AT_ONCE):
            at = past + torch.arange(start, min(start + QUERIES_AT_ONCE, length), device=q.device)
            seen = (keys <= at[:, None])[None]
            if valid is not None:
                seen = seen & valid[:, None]
            if sequence is not None:
                earlier = sequence[:, :1].expand(-1, past)  # what a state holds is of the first sequence
                of_key = torch.cat([earlier, sequence], dim=1)
                seen = seen & (of_key[:, None] == of_key[:, at, None])
            seen = seen | (keys == at[:, None])  # padding sees itself, so that no softmax is over nothing
            part = q[:, :, start : start + QUERIES_AT_ONCE]
            outputs.append(
                F.scaled_dot_product_attention(
                    part, k, v, attn_mask=seen[:, None], scale=self.scale, enable_gqa=gqa
                )
            )
        return torch.cat(outputs, dim=2)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return empty keys and values [B, 0, G, P] and their validity [B, 0]; they grow with each call."""
        shape = (batch_size, 0, self.num_kv_heads, self.head_dim)
        return {
            "k": torch.zeros(shape, dtype=dtype, device=device),
            "v": torch.zeros(shape, dtype=dtype, device=device),
            "valid": torch.zeros(batch_size, 0, dtype=torch.bool, device=device),
        }
