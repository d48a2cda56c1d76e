"""Gemma 2: soft-capped scores, and a sliding window on every other layer."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("gemma2")
class Gemma2(Family):
    """``Gemma2ForCausalLM``."""
