"""Images as the patches of a Qwen-VL vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.data.task import NoVisionTokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig


class Pixels(NamedTuple):
    """One image, cut into patches: `values` [patches, channels, patch area], normalised, and its (H, W) in patches."""

    values: Tensor
    grid: tuple[int, int]


class Patcher:
    """Images to the patches of a Qwen-VL vision tower, by transformers' own image processor.

    The processor runs once an image, and not at all where it would not resize: to cut alone is faster here. Of its
    `temporal_patch_size` equal frames one is kept, so that a batch is little more than a copy.

    Args:
        vision_config: The model's `config.vision_config`.
        dtype: Of the values, as the model computes: a batch of long videos in bf16 is half as large as in fp32.
    """

    def __init__(self, vision_config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
        from transformers import Qwen2VLImageProcessorPil  # the other backend needs torchvision

        self.frames: int = vision_config.temporal_patch_size
        self.merge: int = vision_config.spatial_merge_size
        self.token_side: int = vision_config.patch_size * self.merge
        self.longest_edge: int = Qwen2VLImageProcessorPil.size["longest_edge"]
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=vision_config.patch_size,
            temporal_patch_size=self.frames,
            merge_size=self.merge,
            size={"shortest_edge": self.token_side**2, "longest_edge": self.longest_edge},
        )
        self.dtype = dtype
        self.mean = 255 * torch.tensor(self.processor.image_mean).view(1, -1, 1)
        self.std = 255 * torch.tensor(self.processor.image_std).view(1, -1, 1)

    def cut(self, images: Sequence[Image]) -> list[Pixels]:
        """Cuts images into patches.

        Raises:
            NoVisionTokens: An image is smaller than the square of pixels behind one vision token.
        """
        for image in images:
            if min(image.size) < self.token_side:
                raise NoVisionTokens(
                    f"an image of {image.width}×{image.height} pixels gives no vision token: this model makes one "
                    f"of {self.token_side}×{self.token_side} pixels; enlarge the image or leave it out"
                )
        if all(self._fits(image) for image in images):
            return [self._cut(image) for image in images]
        cut = self.processor(list(images), do_rescale=False, do_normalize=False, return_tensors="pt")
        sizes = cut["image_grid_thw"].prod(1).tolist()
        values = cut["pixel_values"].unflatten(1, (self.mean.shape[1], self.frames, -1))
        grids = [(h, w) for _, h, w in cut["image_grid_thw"].tolist()]
        return [Pixels(self._normal(v), grid) for v, grid in zip(values[:, :, 0].split(sizes), grids)]

    def _fits(self, image: Image) -> bool:
        """Whether the processor leaves an image's size as it is."""
        whole = image.width % self.token_side == image.height % self.token_side == 0
        return (
            whole
            and image.width * image.height <= self.longest_edge
            and max(image.size) <= 200 * min(image.size)
        )

    def _cut(self, image: Image) -> Pixels:
        side = self.token_side // self.merge
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
        grid = (image.height // side, image.width // side)
        blocks = pixels.view(
            grid[0] // self.merge, self.merge, side, grid[1] // self.merge, self.merge, side, 3
        )
        values = blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(grid[0] * grid[1], 3, side * side)
        return Pixels(self._normal(values), grid)

    def _normal(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / self.std).to(self.dtype)

    def pixel_values(self, images: Sequence[Pixels]) -> Tensor:
        """The processor's own `pixel_values` [patches, channels × frames × patch area] for a batch."""
        values = torch.cat([image.values for image in images])[:, :, None]
        return values.expand(-1, -1, self.frames, -1).flatten(1)

    def tokens(self, image: Pixels) -> int:
        """Number of vision tokens that the decoder sees of an image."""
        return image.grid[0] * image.grid[1] // self.merge**2
