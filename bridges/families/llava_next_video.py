"""LLaVA-NeXT-Video: Llama's decoder; images whole and in tiles, videos pooled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridges.families.anyres import place_images, place_videos, tile_side, unpadded_grid
from bridges.families.family import register_family
from bridges.families.vision import ClipTable, VisionFamily


@register_family("llava_next_video")
class LlavaNextVideo(VisionFamily):
    """``LlavaNextVideoForConditionalGeneration``.

    An image is two clips, the whole image and its tiles put together, whose newline tokens are text.
    """

    vision_inputs = ("image_sizes", "pixel_values", "pixel_values_videos")

    def vision_tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids of images and videos."""
        return config.image_token_id, config.video_token_id

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Replay how the features of tiles and frames are packed."""
        side, (image, video) = tile_side(config), self.vision_tokens(config)
        sizes = inputs.get("image_sizes")
        sizes = [] if sizes is None else sizes.tolist()
        place_images(table, image, side, (unpadded_grid(config, tuple(size)) for size in sizes))
        pooled = side // config.spatial_pool_stride
        place_videos(table, video, (pooled, pooled), 0, inputs.get("pixel_values_videos"))
