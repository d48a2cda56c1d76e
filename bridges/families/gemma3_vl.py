"""Gemma 3 that sees: each image, or crop of one, is a square run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bridges.families.family import register_family
from bridges.families.grids import place_squares
from bridges.families.vision import ClipTable, VisionFamily


@register_family("gemma3")
class Gemma3VL(VisionFamily):
    """``Gemma3ForConditionalGeneration``."""

    bidirectional = True

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Cut runs into images."""
        side = math.isqrt(config.mm_tokens_per_image)
        place_squares(table, config.image_token_id, side, inputs.get("pixel_values"))
