"""Mistral: the common pattern, every layer with the same sliding window."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("mistral")
class Mistral(Family):
    """``MistralForCausalLM``."""
