"""Qwen2-VL: Qwen2's decoder under a vision tower; grids are given in patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from bridges.errors import LayoutCaptureError
from bridges.families.family import register_family
from bridges.families.grids import first_run, is_run, raster
from bridges.families.vision import ClipTable, VisionFamily

Grid = tuple[int, int, int]


@register_family("qwen2_vl")
class Qwen2VL(VisionFamily):
    """``Qwen2VLForConditionalGeneration``: each image and each video is one run of its own token."""

    vision_inputs = ("image_grid_thw", "video_grid_thw")
    frames_apart = False
    """Whether text may stand between the frames of a video."""

    def vision_tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids of images and videos."""
        return config.image_token_id, config.video_token_id

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Cut the runs of image and video tokens into grids."""
        merge = config.vision_config.spatial_merge_size
        for kind, token in zip(("image", "video"), self.vision_tokens(config)):
            given = inputs.get(f"{kind}_grid_thw")
            grids: list[list[int]] = [] if given is None else given.tolist()
            left = iter(grids)
            for row, slots in table.slots(token):
                while len(slots):
                    grid = _next_grid(left, kind, row, merge)
                    size = grid[0] * grid[1] * grid[2]
                    self._check_fits(slots, grid, f"row {row}: {kind} tokens", f"{kind}_grid_thw")
                    table.add(row, slots[:size], raster(*grid))
                    slots = slots[size:]
            if unused := len(list(left)):
                raise LayoutCaptureError(
                    f"{kind}_grid_thw has {len(grids)} grids, {unused} more than there are runs of {kind} tokens."
                )

    def _check_fits(self, slots: Tensor, grid: Grid, what: str, name: str) -> None:
        t, h, w = grid
        parts, size = (t, h * w) if self.frames_apart else (1, t * h * w)
        for number in range(parts):
            rest = slots[number * size :]
            if not is_run(rest, size):
                found = first_run(rest) if len(rest) else 0
                start = int(rest[0]) if len(rest) else int(slots[-1]) + 1
                raise LayoutCaptureError(
                    f"{what} {start}…{start + found - 1} are {found}, but the next {name} makes {grid} = {t * h * w} "
                    f"tokens{f', {size} a frame' if parts > 1 else ''}."
                )


def _next_grid(left: Iterator[list[int]], kind: str, row: int, merge: int) -> Grid:
    grid = next(left, None)
    if grid is None:
        raise LayoutCaptureError(
            f"row {row} has more {kind} tokens than {kind}_grid_thw has grids; pass the grids of the whole prompt."
        )
    t, h, w = grid
    if t < 1 or h < merge or w < merge or h % merge or w % merge:
        raise LayoutCaptureError(
            f"{kind}_grid_thw {grid} is no grid of tokens: each side needs a positive multiple of {merge} patches "
            "and a video at least one temporal patch."
        )
    return t, h // merge, w // merge
