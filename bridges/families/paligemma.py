"""PaliGemma: Gemma's decoder after a prefix of square images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridges.families.family import register_family
from bridges.families.grids import place_squares
from bridges.families.vision import ClipTable, VisionFamily
from mixers import TokenMixer


@register_family("paligemma")
class PaliGemma(VisionFamily):
    """``PaliGemmaForConditionalGeneration``: images of one size stand side by side in one run.

    The teacher attends in both directions within the whole prefix, text included; a mixer does so
    within each image, and reads the text of the prefix causally, which the report lists as dropped.
    """

    bidirectional = True

    def dropped(self, attention: Any, mixer: TokenMixer) -> list[str]:
        """Name the attention within the prefix; see :meth:`Family.dropped`."""
        return [
            *super().dropped(attention, mixer),
            "attention in both directions within the text of the prefix",
        ]

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Cut the run into images."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        place_squares(table, config.image_token_id, side, inputs.get("pixel_values"))
