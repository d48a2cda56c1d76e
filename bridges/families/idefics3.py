"""Idefics3: SmolVLM's layout of tiles."""

from __future__ import annotations

from bridges.families.family import register_family
from bridges.families.smolvlm import SmolVLM


@register_family("idefics3")
class Idefics3(SmolVLM):
    """``Idefics3ForConditionalGeneration``."""
