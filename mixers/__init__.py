"""Composable token mixers with linear cost, from the plain-torch ops up. Knows torch alone."""

from mixers import attention, bimamba2, flex_ma, gated, mamba2, mmate, sliding_window, swin3d
from mixers.errors import (
    BackendError,
    ConfigError,
    DuplicateMixerError,
    LayoutError,
    MixerError,
    ShapeError,
    StateError,
    UnknownMixerError,
)
from mixers.interface import MixerConfig, MixerState, Rotary, TokenMixer
from mixers.layout import Grid, TokenLayout
from mixers.ops import backends, use_backend
from mixers.registry import Description, available, build, describe, get, register
from mixers.scan import ROTARY_MAJOR_SCAN

__all__ = [
    "ROTARY_MAJOR_SCAN",
    "BackendError",
    "ConfigError",
    "Description",
    "DuplicateMixerError",
    "Grid",
    "LayoutError",
    "MixerConfig",
    "MixerError",
    "MixerState",
    "Rotary",
    "ShapeError",
    "StateError",
    "TokenLayout",
    "TokenMixer",
    "UnknownMixerError",
    "attention",
    "available",
    "backends",
    "bimamba2",
    "build",
    "describe",
    "flex_ma",
    "gated",
    "get",
    "mamba2",
    "mmate",
    "register",
    "sliding_window",
    "swin3d",
    "use_backend",
]
