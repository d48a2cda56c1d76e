"""Local-Swin: attention inside small shifted 3-D windows of each clip (LinMU, arXiv 2601.01322)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.errors import ConfigError
from mixers.interface import MixerConfig, MixerState, Rotary
from mixers.layout import TokenLayout
from mixers.ops import block_attention
from mixers.recent import init_recent, prepare_recent, recent_attention
from mixers.registry import register
from mixers.weights import SoftmaxMixer, recent_seen


@dataclass(kw_only=True)
class Swin3DConfig(MixerConfig):
    """Settings of ``swin3d``.

    Args:
        window: Extent of a window in tokens along (t, h, w).
        shift: Whether odd layers move the windows by half their extent.
        text_window: Tokens that a text token looks back at, itself included, vision among them.
            0, as in the paper: text takes no part.
        sinks: First tokens of a sequence that text tokens look at besides, and vision tokens where they are text
            (arXiv 2309.17453; not in the paper). They need a text window.
    """

    window: tuple[int, int, int] = (4, 4, 4)
    shift: bool = True
    text_window: int = 128
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_windows(self.window, self.text_window, self.sinks)


def check_windows(window: tuple[int, ...], text_window: int, sinks: int) -> None:
    """Raise ConfigError unless the extents are positive, the others not negative, and sinks have a text window."""
    if min(window) < 1:
        raise ConfigError(f"window must be three positive extents (t, h, w), found {window}.")
    if text_window < 0:
        raise ConfigError(f"text_window must not be negative, found {text_window}.")
    if sinks < 0 or (sinks and not text_window):
        raise ConfigError(
            f"sinks must not be negative, and need a text_window, found sinks={sinks}, text_window={text_window}: "
            "set sinks=0, or a text_window."
        )


@register("swin3d", config=Swin3DConfig)
class Swin3D(SoftmaxMixer):
    """Softmax attention inside small 3-D windows of each clip, both directions, shifted on odd layers.

    Windows are cut at the grid's border, without a cyclic wrap. Text tokens attend causally to the
    last ``text_window`` tokens (ours, beyond the paper).
    """

    config: Swin3DConfig

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
        """Attend within windows; see :meth:`TokenMixer.mix_heads`."""
        if self.config.text_window:
            y = recent_attention(
                q,
                k,
                v,
                layout,
                state,
                window=self.config.text_window,
                scale=self.scale,
                rotary=rotary,
                grid_windows=(self.config.window, self._shifted),
                softcap=self.config.softcap,
                sinks=self.config.sinks,
            )
            return y, None
        windows, covered = layout.windows(self.config.window, self._shifted), layout.vision
        if windows is None or covered is None:
            return torch.zeros_like(q), torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        y = block_attention(q, k, v, windows, scale=self.scale, rotary=rotary, softcap=self.config.softcap)
        return y, covered

    def seen(self, layout: TokenLayout, queries: Tensor) -> Tensor:
        """Tell what tokens look at; see :meth:`SoftmaxMixer.seen`."""
        return recent_seen(
            layout,
            queries,
            window=self.config.text_window,
            sinks=self.config.sinks,
            grid_windows=(self.config.window, self._shifted),
        )

    def prepare(self, layout: TokenLayout, *, cached: bool = False) -> None:
        """Make the windows; see :meth:`TokenMixer.prepare`."""
        grid_windows = (self.config.window, self._shifted)
        if self.config.text_window:
            prepare_recent(
                layout,
                window=self.config.text_window,
                cached=cached,
                grid_windows=grid_windows,
                sinks=self.config.sinks,
            )
        else:
            layout.windows(*grid_windows)

    @property
    def _shifted(self) -> bool:
        return self.config.shift and self.config.layer_idx % 2 == 1

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return the state of the text window, or an empty one where there is none."""
        if self.config.text_window == 0:
            return {}
        return init_recent(
            batch_size,
            self.config.text_window,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            device,
            self.config.sinks,
        )
