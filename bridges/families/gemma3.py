"""Gemma 3's text decoder: norms on heads, and most layers with a sliding window and a rotary base of their own."""

from __future__ import annotations

from typing import Any

from bridges.families.family import Family, register_family
from mixers import TokenMixer


@register_family("gemma3_text")
class Gemma3(Family):
    """``Gemma3ForCausalLM``; models that embed text, whose attention looks ahead, lose that."""

    def dropped(self, attention: Any, mixer: TokenMixer) -> list[str]:
        """Name the attention to later tokens; see :meth:`Family.dropped`."""
        return ["attention to later tokens"] if attention.config.use_bidirectional_attention else []
