"""Causal sliding-window attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.errors import ConfigError
from mixers.interface import MixerConfig, MixerState, Rotary
from mixers.layout import TokenLayout
from mixers.recent import init_recent, prepare_recent, recent_attention
from mixers.registry import register
from mixers.weights import SoftmaxMixer, recent_seen


@dataclass(kw_only=True)
class SlidingWindowConfig(MixerConfig):
    """Settings of ``sliding_window``.

    Args:
        window: Tokens that each token looks at, itself included.
        sinks: First tokens of a sequence that every token looks at besides (arXiv 2309.17453).
    """

    window: int = 128
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(f"window must be at least 1, found {self.window}.")
        if self.sinks < 0:
            raise ConfigError(f"sinks must not be negative, found {self.sinks}.")


@register("sliding_window", config=SlidingWindowConfig)
class SlidingWindow(SoftmaxMixer):
    """Softmax attention to the last ``window`` tokens, text and vision alike; O(N) time, constant state."""

    config: SlidingWindowConfig

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
        """Attend to recent tokens; see :meth:`TokenMixer.mix_heads`."""
        y = recent_attention(
            q,
            k,
            v,
            layout,
            state,
            window=self.config.window,
            scale=self.scale,
            rotary=rotary,
            softcap=self.config.softcap,
            sinks=self.config.sinks,
        )
        return y, None

    def seen(self, layout: TokenLayout, queries: Tensor) -> Tensor:
        """Tell what tokens look at; see :meth:`SoftmaxMixer.seen`."""
        return recent_seen(
            layout,
            queries,
            window=self.config.window,
            sinks=self.config.sinks,
            grid_windows=None,
        )

    def prepare(self, layout: TokenLayout, *, cached: bool = False) -> None:
        """Make the window; see :meth:`TokenMixer.prepare`."""
        prepare_recent(layout, window=self.config.window, cached=cached, sinks=self.config.sinks)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return the state of :func:`~mixers.recent.init_recent`."""
        return init_recent(
            batch_size,
            self.config.window,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            device,
            self.config.sinks,
        )
