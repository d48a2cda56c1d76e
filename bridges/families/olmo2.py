"""OLMo 2: norms over the full width of queries and keys."""

from __future__ import annotations

from bridges.families.family import Family, register_family


@register_family("olmo2")
class Olmo2(Family):
    """``Olmo2ForCausalLM``."""
