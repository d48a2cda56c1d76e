"""Qwen3: the common pattern, with a norm on each head's queries and keys."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("qwen3")
class Qwen3(Family):
    """``Qwen3ForCausalLM``."""
