"""LLaVA-OneVision: Qwen2's decoder; images whole and in tiles, videos pooled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bridges.families.anyres import place_images, place_videos, tile_side, unpadded_grid
from bridges.families.family import register_family
from bridges.families.vision import ClipTable, VisionFamily


@register_family("llava_onevision")
class LlavaOneVision(VisionFamily):
    """``LlavaOnevisionForConditionalGeneration``.

    An image alone in its row is two clips, the whole image and its tiles put together; one of several is
    the whole image alone. Newline tokens are text.
    """

    vision_inputs = ("image_sizes", "pixel_values", "pixel_values_videos")

    def vision_tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids of images and videos."""
        return config.image_token_id, config.video_token_id

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Replay how the features of tiles and frames are packed."""
        side, (image, video) = tile_side(config), self.vision_tokens(config)
        place_images(table, image, side, self._grids(config, inputs))
        pooled = -(-side // 2)
        place_videos(table, video, (pooled, pooled), 1, inputs.get("pixel_values_videos"))

    def _grids(self, config: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[int, int] | None]:
        sizes, counts = inputs.get("image_sizes"), inputs.get("batch_num_images")
        sizes = [] if sizes is None else sizes.tolist()
        alone = (
            [True] * len(sizes) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        )
        most_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        for size, tiled in zip(sizes, alone):
            yield unpadded_grid(config, tuple(size), most_tiles) if tiled else None
