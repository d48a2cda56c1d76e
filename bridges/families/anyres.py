"""Images cut into tiles as LLaVA-NeXT does: how many tokens a side is left after padding is taken off again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers.image_processing_utils import select_best_resolution

from bridges.errors import LayoutCaptureError
from bridges.families.grids import check_run, first_run, raster
from bridges.families.vision import ClipTable


def tile_side(config: Any) -> int:
    """Return the patches a side of one tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def unpadded_grid(config: Any, size: tuple[int, int], most_tiles: int | None = None) -> tuple[int, int]:
    """Return the (H, W) tokens of an image's tiles together, without the padding of the resized image.

    Args:
        config: The model's config.
        size: Height and width of the original image.
        most_tiles: Tiles whose patches the image is scaled down to if it has many more.
    """
    tile, side = config.vision_config.image_size, tile_side(config)
    best_height, best_width = select_best_resolution(size, config.image_grid_pinpoints)
    height, width = best_height // tile * side, best_width // tile * side
    original_height, original_width = size
    if original_width / original_height > width / height:
        used = int(round(original_height * (width / original_width), 7))
        height -= (height - used) // 2 * 2
    else:
        used = int(round(original_width * (height / original_height), 7))
        width -= (width - used) // 2 * 2
    if most_tiles is not None:
        ratio = math.sqrt(height * width / (most_tiles * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return height, width


def place_images(table: ClipTable, token: int, side: int, grids: Iterator[tuple[int, int] | None]) -> None:
    """Add the images of a batch: a clip for the whole image as one tile, another for its tiles together.

    A newline token stands after each row of the tiles, or after the one tile; it is text.

    Args:
        table: The batch.
        token: The id of image tokens.
        side: Patches a side of one tile.
        grids: For each image, the (H, W) of its tiles together; None where it is one tile alone.

    Raises:
        LayoutCaptureError: The tokens do not match the grids.
    """
    for row, slots in table.slots(token):
        while len(slots):
            try:
                grid = next(grids)
            except StopIteration:
                raise LayoutCaptureError(
                    f"row {row} has more image tokens than image_sizes has images; pass the sizes of the whole prompt."
                ) from None
            whole, tiles = side**2, 1 if grid is None else grid[0] * (grid[1] + 1)
            check_run(slots, whole + tiles, f"row {row}: image tokens", "the next of image_sizes")
            table.add(row, slots[:whole], raster(1, side, side))
            if grid is not None:
                kept = slots[whole : whole + tiles].view(grid[0], grid[1] + 1)[:, :-1]
                table.add(row, kept.flatten(), raster(1, *grid))
            slots = slots[whole + tiles :]
    if unused := len(list(grids)):
        raise LayoutCaptureError(f"image_sizes has {unused} images more than there are runs of image tokens.")


def place_videos(table: ClipTable, token: int, frame: tuple[int, int], newlines: int, pixels: Any) -> None:
    """Add the videos of a batch, each one run.

    Args:
        table: The batch.
        token: The id of video tokens.
        frame: The (h, w) of a frame in tokens.
        newlines: Tokens that stand after a video, as text.
        pixels: [videos, frames, C, H, W]; None where they were encoded before.

    Raises:
        LayoutCaptureError: The tokens do not match the pixels, or are no whole frames.
    """
    size, found = frame[0] * frame[1], 0
    for row, slots in table.slots(token):
        while len(slots):
            frames = (first_run(slots) - newlines) // size if pixels is None else pixels.shape[1]
            frames = max(frames, 1)
            wanted = frames * size + newlines
            check_run(slots, wanted, f"row {row}: video tokens", f"a video of {frames} frames of {frame}")
            table.add(row, slots[: wanted - newlines], raster(frames, *frame))
            slots, found = slots[wanted:], found + 1
    if pixels is not None and found != len(pixels):
        raise LayoutCaptureError(f"pixel_values_videos has {len(pixels)} videos, the tokens {found}.")
