"""SmolVLM: Llama's decoder; tiles and frames of one size, told apart by the text between them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bridges.families.captions import captioned_alike, warn_frames
from bridges.families.family import register_family
from bridges.families.grids import check_count, raster, slots_of, squares
from bridges.families.vision import ClipTable, Run, VisionFamily, warn_once


@register_family("smolvlm")
class SmolVLM(VisionFamily):
    """``SmolVLMForConditionalGeneration``: each tile and each frame is one run.

    The model is not told which tiles make an image, or which images are frames of a video; the text
    says it. One token stands before each tile and its name, and after the last tile of an image, which
    is the whole image; a line break ends a row of tiles. The tiles put together are one clip, with text
    inside its extent, the whole image is another. Images whose captions differ in a number alone,
    such as timestamps, are the frames of one clip. Tiles that make no full grid are a clip each. Both
    assumptions are told by a :class:`bridges.LayoutFallbackWarning`.
    """

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Put tiles together into images and frames into videos."""
        pixels, vision = inputs.get("pixel_values"), config.vision_config
        width = vision.image_size if pixels is None else pixels.shape[-1]
        side = width // vision.patch_size // config.scale_factor
        found = 0
        for row, runs in table.runs(config.image_token_id):
            tiles = squares(runs, side, f"row {row}: image", f"a tile of {width} pixels a side")
            found += len(tiles)
            self._place_row(table, config, row, tiles, side)
        if pixels is not None:
            check_count(int((pixels != 0).flatten(2).any(-1).sum()), found, "tiles")

    def _place_row(self, table: ClipTable, config: Any, row: int, runs: list[Run], side: int) -> None:
        ids = table.ids[row].tolist()
        ends = dict(zip(runs, [0, *(stop for _, stop in runs)]))
        alone: list[Run] = []
        for rows, whole in _images(ids, runs):
            if not rows:
                alone.append(whole)
                continue
            table.add(row, slots_of([whole]), raster(1, side, side))
            tiles = [tile for one in rows for tile in one]
            if len({len(one) for one in rows}) == 1:
                corners = [(0, r * side, c * side) for r, one in enumerate(rows) for c in range(len(one))]
                places = torch.tensor(corners)[:, None] + raster(1, side, side)
                table.add(row, slots_of(tiles), places.flatten(0, 1))
                continue
            warn_once(
                config,
                "the tiles of an image make no full grid by the text between them, so each is read alone",
            )
            for tile in tiles:
                table.add(row, slots_of([tile]), raster(1, side, side))
        for frames in captioned_alike(ids, alone, [ends[run] for run in alone]):
            if len(frames) > 1:
                warn_frames(config)
            table.add(row, slots_of([alone[i] for i in frames]), raster(len(frames), side, side))


def _images(ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[list[list[Run]], Run]]:
    """Return for each image of a row its rows of tiles, and the whole image.

    A token, that after the last run, stands once between two tiles of an image: at once where they are
    of one row of tiles, after a line break where they are not. Between two images it stands twice.
    """
    mark = [*ids, -1][runs[-1][1]]
    images = [[[runs[0]]]]
    for (_, end), run in itertools.pairwise(runs):
        between = ids[end : run[0]]
        if between.count(mark) != 1:
            images.append([[run]])
        elif between[0] == mark:
            images[-1][-1].append(run)
        else:
            images[-1].append([run])
    found = []
    for rows in images:
        whole = rows[-1].pop()
        found.append(([one for one in rows if one], whole))
    return found
