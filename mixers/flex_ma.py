"""Flex-MA, the long-range branch of M-MATE (LinMU, arXiv 2601.01322)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mixers.bimamba2 import BiMamba2, BiMamba2Config
from mixers.registry import register


@dataclass(kw_only=True)
class FlexMAConfig(BiMamba2Config):
    """Settings of ``flex_ma``: those of ``bimamba2`` with defaults that suit a teacher's weights.

    A softmax feature map and a denominator make y a weighted mean of values, as attention is, so the
    mixer starts near the teacher.
    """

    scan: Literal["raster", "rms"] = "rms"
    feature_map: Literal["none", "softmax", "l2"] = "softmax"
    normalizer: Literal["none", "rms", "denominator"] = "denominator"
    output_gate: bool = False


@register("flex_ma", config=FlexMAConfig)
class FlexMA(BiMamba2):
    """Masked bidirectional Mamba2 over Rotary Major Scan; M-MATE's long-range branch."""

    config: FlexMAConfig
