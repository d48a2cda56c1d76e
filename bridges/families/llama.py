"""Llama: the common pattern itself."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("llama")
class Llama(Family):
    """``LlamaForCausalLM`` and models of its structure."""
