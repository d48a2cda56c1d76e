"""Batches for the mini VLM, of random pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recipes.data.task import Batch, pad

WORDS = range(7, 20)
Segment = int | tuple[str, tuple[int, int, int]]
"""A number of words, or an image or video: ``(kind, its grid in patches)``."""

ROWS: list[list[Segment]] = [
    [2, ("image", (1, 4, 4)), 3, ("video", (6, 2, 4)), 4],
    [1, ("video", (3, 4, 2)), 5],
    [6, ("image", (1, 2, 6)), 2],
]


def batch(config: Any, rows: Sequence[Sequence[Segment]] = ROWS, side: str = "left") -> Batch:
    """The keyword arguments of a forward; padding is on ``side``."""
    generator = torch.Generator().manual_seed(0)
    tokens = {"image": config.image_token_id, "video": config.video_token_id}
    grids: dict[str, list[Any]] = {"image": [], "video": []}
    ids = []
    for row in rows:
        ids.append([])
        for segment in row:
            if isinstance(segment, int):
                ids[-1] += torch.randint(WORDS.start, WORDS.stop, (segment,), generator=generator).tolist()
                continue
            kind, (t, h, w) = segment
            grids[kind].append((t, h, w))
            marks = config.vision_start_token_id, config.vision_end_token_id
            ids[-1] += [marks[0], *[tokens[kind]] * (t * h * w // 4), marks[1]]
    input_ids = pad(ids, 0, side)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": pad([[1] * len(row) for row in ids], 0, side),
        "mm_token_type_ids": (input_ids == tokens["image"]) + 2 * (input_ids == tokens["video"]),
    }
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            grid = torch.tensor(grids[kind])
            inputs[f"{kind}_grid_thw"] = grid
            inputs[pixels] = torch.randn(int(grid.prod(1).sum()), 3 * 16 * 16, generator=generator)
    return inputs
