"""InternVL: tiles of an image in one run, frames of a video in runs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridges.families.captions import captioned_alike, warn_frames
from bridges.families.family import register_family
from bridges.families.grids import check_count, raster, slots_of, squares
from bridges.families.vision import ClipTable, VisionFamily, warn_once


@register_family("internvl")
class InternVL(VisionFamily):
    """``InternVLForConditionalGeneration``: each run is one image, of one tile or several.

    Nothing tells the model how the tiles of an image are arranged, so they are the frames of one clip,
    the thumbnail last. Runs of one tile whose captions differ in a number alone (``Frame1:``,
    ``Frame2:``) are the frames of one video. Both are told by a :class:`bridges.LayoutFallbackWarning`.
    """

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Cut runs into tiles, and put the frames of a video together."""
        pixels, vision = inputs.get("pixel_values"), config.vision_config
        width = vision.image_size[1] if pixels is None else pixels.shape[-1]
        side = int(width // vision.patch_size[1] * config.downsample_ratio)
        found = 0
        for row, runs in table.runs(config.image_token_id):
            for run in runs:
                tiles = len(squares([run], side, f"row {row}: image", f"a tile of {width} pixels a side"))
                found += tiles
                if tiles > 1:
                    warn_once(
                        config,
                        "the arrangement of an image's tiles is not known, so they are read as frames of one clip",
                    )
                    table.add(row, slots_of([run]), raster(tiles, side, side))
            ends = [0, *(stop for _, stop in runs)]
            alone = [(run, end) for run, end in zip(runs, ends) if run[1] - run[0] == side**2]
            ids = table.ids[row].tolist()
            for frames in captioned_alike(ids, [run for run, _ in alone], [end for _, end in alone]):
                if len(frames) > 1:
                    warn_frames(config)
                table.add(row, slots_of([alone[i][0] for i in frames]), raster(len(frames), side, side))
        if pixels is not None:
            check_count(len(pixels), found, "tiles")
