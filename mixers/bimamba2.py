"""Masked bidirectional Mamba2: causal for text, both directions within a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mixers.decay import Decay
from mixers.layout import Scan, TokenLayout
from mixers.mamba2 import Mamba2, Mamba2Config
from mixers.registry import register
from mixers.scan import scan_axes


@dataclass(kw_only=True)
class BiMamba2Config(Mamba2Config):
    """Settings of ``bimamba2``; those of ``mamba2`` and the following.

    Args:
        scan: Order in which a clip is read: ``"raster"``, or ``"rms"`` (Rotary Major Scan).
        backward: Whether vision tokens are also scanned backward within their clip.
    """

    scan: Literal["raster", "rms"] = "raster"
    backward: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        scan_axes(self.scan, self.layer_idx)


@register("bimamba2", config=BiMamba2Config)
class BiMamba2(Mamba2):
    """Mamba2 that reads text causally and each clip in both directions; O(N) time, constant state."""

    config: BiMamba2Config

    def __init__(self, config: BiMamba2Config, *, projections: bool = True) -> None:
        super().__init__(config, projections=projections)
        if config.backward:
            self.backward_decay = Decay(config.dim, len(self.decay.rates.A_log), config.memory)

    def _scan(self, layout: TokenLayout) -> Scan:
        return layout.scan(scan_axes(self.config.scan, self.config.layer_idx))

    def _backward_decay(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor] | None:
        return self.backward_decay(x) if self.config.backward and layout.vision is not None else None
