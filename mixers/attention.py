"""Softmax attention as teachers have it: the exact twin of their layer, and the identity bridge's mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.errors import ConfigError
from mixers.interface import MixerConfig, MixerState, Rotary
from mixers.layout import TokenLayout
from mixers.registry import register
from mixers.rotary import apply_rotary
from mixers.softmax import softmax_attention
from mixers.weights import SoftmaxMixer, at, kept_for

QUERIES_AT_ONCE = 512


@dataclass(kw_only=True)
class AttentionConfig(MixerConfig):
    """Settings of ``attention``.

    Args:
        window: Tokens of the row that each token looks back at, itself and padding included, as
            Hugging Face counts. None: all.
        bidirectional: Whether the tokens of a clip look at its later tokens too, as far as those
            before the clip's end; text stays causal (Gemma 3, arXiv 2503.19786).
    """

    window: int | None = None
    bidirectional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 or None, found {self.window}.")


@register("attention", config=AttentionConfig)
class Attention(SoftmaxMixer):
    """Softmax attention over all earlier tokens; O(N²) time, and a state that grows.

    Causal for text and vision alike, as decoders are trained, unless they were trained otherwise. It
    exists to prove a bridge exact and to keep chosen layers as they were. No N×N mask is ever built:
    a few queries at a time are masked, with the keys that any of them looks at. With a ``window``
    the state grows to that many tokens.
    """

    config: AttentionConfig

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
            window = self.config.window
            kept = slice(0 if window is None else max(0, k.shape[1] - window + 1), None)
            state.update(k=k[:, kept].detach(), v=v[:, kept].detach(), valid=valid[:, kept])
            if bool(valid.all()):
                valid = None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._attend(q, k, v, valid, layout, past).transpose(1, 2), None

    def seen(self, layout: TokenLayout, queries: Tensor) -> Tensor:
        """Tell what tokens look at; see :meth:`SoftmaxMixer.seen`."""
        window, to_end = self.config.window, self.config.bidirectional
        name = ("causal", window, to_end)
        return kept_for(layout, queries, name, lambda: _seen(layout, queries, window, to_end))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, layout: TokenLayout, past: int
    ) -> Tensor:
        length, window = q.shape[2], self.config.window or past + q.shape[2]
        if length == 0:
            return q
        ends = layout.end if self.config.bidirectional and layout.clip is not None else None
        plain = valid is None and layout.sequence is None and ends is None and self.config.softcap is None
        if plain and window >= past + length and (past == 0 or length == 1):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=length > 1, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        of_key = None
        if layout.sequence is not None:  # what a state holds is of the first sequence
            of_key = torch.cat([layout.sequence[:, :1].expand(-1, past), layout.sequence], dim=1)
        outputs = []
        for start in range(0, length, QUERIES_AT_ONCE):
            own = slice(start, min(start + QUERIES_AT_ONCE, length))
            at = past + torch.arange(own.start, own.stop, device=q.device)
            end = at[None] + 1 if ends is None else past + ends[:, own]
            first, stop = max(0, past + own.start - window + 1), past + own.stop
            if ends is not None:
                stop = max(stop, int(end.max()))
            keys = torch.arange(first, stop, device=q.device)
            seen = (keys < end[..., None]) & (keys > at[:, None] - window)
            if valid is not None:
                seen = seen & valid[:, None, first:stop]
            if of_key is not None:
                seen = seen & (of_key[:, None, first:stop] == of_key[:, at, None])
            seen = seen | (keys == at[:, None])  # padding sees itself, so that no softmax is over nothing
            outputs.append(
                softmax_attention(
                    q[:, :, own],
                    k[:, :, first:stop],
                    v[:, :, first:stop],
                    seen[:, None],
                    scale=self.scale,
                    softcap=self.config.softcap,
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


def _seen(layout: TokenLayout, queries: Tensor, window: int | None, to_end: bool) -> Tensor:
    token = torch.arange(layout.length, device=queries.device)
    end = at(layout.end, queries) if to_end else queries + 1
    seen = token < end[..., None]
    if window is not None:
        seen = seen & (token > queries[..., None] - window)
    if layout.sequence is not None:
        seen = seen & (at(layout.sequence, queries)[..., None] == layout.sequence[:, None])
    return seen if layout.valid is None else seen & layout.valid[:, None]
