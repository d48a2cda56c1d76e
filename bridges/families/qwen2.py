"""Qwen2 and Qwen2.5: the common pattern, with biases on q, k and v."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("qwen2")
class Qwen2(Family):
    """``Qwen2ForCausalLM``."""
