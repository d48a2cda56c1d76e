"""Qwen2.5-VL: Qwen2's decoder under a vision tower; grids are given in patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bridges.errors import LayoutCaptureError
from bridges.families.family import Clips, Family, register_family


@register_family("qwen2_5_vl")
class Qwen25VL(Family):
    """``Qwen2_5_VLForConditionalGeneration``: each image and each video is one run of its own token."""

    def clips(self, config: Any, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> Clips | None:
        """Cut the runs of image and video tokens into grids; see :meth:`Family.clips`."""
        kinds = {
            config.image_token_id: ("image", inputs.get("image_grid_thw")),
            config.video_token_id: ("video", inputs.get("video_grid_thw")),
        }
        if input_ids is None:
            if any(grids is not None for _, grids in kinds.values()):
                raise LayoutCaptureError(
                    "there are grids but no input_ids, which alone say where vision stands; pass them along with "
                    "inputs_embeds."
                )
            return None
        ids = input_ids.cpu()
        if all(grids is None and not bool((ids == token).any()) for token, (_, grids) in kinds.items()):
            return None
        merge = config.vision_config.spatial_merge_size
        clip = torch.full_like(ids, -1)
        coords = torch.zeros(*ids.shape, 3, dtype=torch.long)
        number = [0] * len(ids)
        for token, (kind, grids) in kinds.items():
            left = iter([] if grids is None else grids.tolist())
            for row, start, stop in _runs(ids == token):
                while start < stop:
                    t, h, w = _next_grid(left, kind, row, merge)
                    size = t * h * w
                    if start + size > stop:
                        raise LayoutCaptureError(
                            f"row {row}: {kind} tokens {start}…{stop - 1} are {stop - start}, but the next "
                            f"{kind}_grid_thw makes ({t}, {h}, {w}) = {size} tokens."
                        )
                    clip[row, start : start + size] = number[row]
                    axes = (torch.arange(t), torch.arange(h), torch.arange(w))
                    coords[row, start : start + size] = torch.cartesian_prod(*axes)
                    number[row] += 1
                    start += size
            if (unused := len(list(left))) and grids is not None:
                raise LayoutCaptureError(
                    f"{kind}_grid_thw has {len(grids)} grids, {unused} more than there are runs of {kind} tokens."
                )
        return Clips(clip.to(input_ids.device), coords.to(input_ids.device))


def _runs(mask: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, stop) of each run of True in [B, N], row by row."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist()):
        yield row, start, stop


def _next_grid(left: Iterator[list[int]], kind: str, row: int, merge: int) -> tuple[int, int, int]:
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
