"""Tiny mixers with random weights: every registered one, and variants of those with options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mixers
from mixers import Rotary, TokenMixer

TINY = {"dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": True, "out_bias": True}
SSD = {"chunk_size": 8, "rotary": True}
WINDOWS = {"window": (2, 2, 3), "text_window": 5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"qk_norm": "head"}),
    "attention-bidirectional": ("attention", {"bidirectional": True, "softcap": 2.0}),
    "sliding_window": ("sliding_window", {"window": 5, "qk_norm": "full"}),
    "sliding_window-sinks": ("sliding_window", {"window": 3, "sinks": 2, "softcap": 2.0}),
    "mamba2": ("mamba2", SSD),
    "mamba2-head-decay": ("mamba2", {**SSD, "decay": "head", "normalizer": "none", "conv_size": 0}),
    "bimamba2": ("bimamba2", SSD),
    "bimamba2-l2": ("bimamba2", {**SSD, "feature_map": "l2", "scan": "rms", "decay": "head"}),
    "flex_ma": ("flex_ma", SSD),
    "flex_ma-features": ("flex_ma", {**SSD, "features": 13}),
    "swin3d": ("swin3d", {**WINDOWS, "softcap": 2.0}),
    "swin3d-sinks": ("swin3d", {**WINDOWS, "text_window": 3, "sinks": 2}),
    "swin3d-paper": ("swin3d", {**WINDOWS, "text_window": 0}),
    "gated": (
        "gated",
        {
            "branches": {
                "sliding_window": {"window": 4},
                "far": {"mixer": "flex_ma", **SSD},
                "near": {"mixer": "swin3d", **WINDOWS},
            }
        },
    ),
    "mmate": ("mmate", {**SSD, **WINDOWS}),
    "mmate-sinks": ("mmate", {**SSD, **WINDOWS, "sinks": 1, "gate": "head"}),
    "mmate-paper": (
        "mmate",
        {**SSD, **WINDOWS, "text_window": 0, "gate": "head", "share_projections": False, "qk_norm": "head"},
    ),
}
VARIANTS |= {name: (name, {}) for name in mixers.available() if name not in VARIANTS}

AVERAGES = [
    "attention",
    "attention-bidirectional",
    "sliding_window",
    "sliding_window-sinks",
    "flex_ma",
    "flex_ma-features",
    "swin3d",
    "swin3d-sinks",
    "swin3d-paper",
    "gated",
    "mmate",
    "mmate-sinks",
]
"""Variants that can tell their attention weights."""


def tiny(variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> TokenMixer:
    """Build a variant with weights in which nothing is zero, equal or the identity."""
    name, own = VARIANTS[variant]
    torch.manual_seed(seed)
    mixer = mixers.build(name, **{**TINY, **own, **config}).to(dtype)
    return shaken(mixer)


def shaken(module: nn.Module) -> Any:
    """Add noise to every parameter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def random_rotary(batch: int, length: int, dtype: torch.dtype = torch.float32, width: int = 8) -> Rotary:
    """Return (cos, sin) of random angles, one a token and frequency."""
    angle = torch.randn(batch, length, width // 2, dtype=torch.float64).repeat(1, 1, 2).mul(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def take_rotary(rotary: Rotary, row: int, tokens: Tensor | slice) -> Rotary:
    """Return the rotary tables of some tokens of a row, as a batch of one."""
    cos, sin = rotary
    return cos[row, tokens][None], sin[row, tokens][None]
