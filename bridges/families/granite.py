"""Granite: the common pattern, with a factor of its own on query·key."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("granite")
class Granite(Family):
    """``GraniteForCausalLM``."""
