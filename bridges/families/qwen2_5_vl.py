"""Qwen2.5-VL: its tokens are laid out as Qwen2-VL's."""

from __future__ import annotations

from bridges.families.family import register_family
from bridges.families.qwen2_vl import Qwen2VL


@register_family("qwen2_5_vl")
class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``."""
