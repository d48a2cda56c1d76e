"""Qwen3-VL: a timestamp stands before each frame of a video."""

from __future__ import annotations

from bridges.families.family import register_family
from bridges.families.qwen2_vl import Qwen2VL


@register_family("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration``: a video is one clip with text inside its extent."""

    frames_apart = True
