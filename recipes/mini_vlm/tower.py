"""The vision tower: patches back to frames, a frozen EfficientNet-Lite0, and a projector to the decoder's width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling

from recipes.errors import RecipeError
from recipes.mini_vlm.efficientnet import HEAD, MIDDLE, STRIDE, EfficientNetLite0

CHANNELS = 3
FEATURES = 4 * MIDDLE + HEAD
"""Numbers that the network has for a token of 32×32 pixels: four positions at stride 16, one at stride 32."""

FRAMES = 256
"""Frames that go through the network at a time, at most, which bounds the memory of a long video."""


class GridError(RecipeError, ValueError):
    """The patches of a batch are not those of its grids."""


class MiniVLMVisionConfig(PreTrainedConfig):
    """How pixels become tokens.

    Attributes:
        hidden_size: The decoder's width.
        patch_size: Pixels a side of a patch.
        spatial_merge_size: Patches a side of a token.
        temporal_patch_size: Frames of a patch.
        image_mean: What the image processor subtracts from colours of 0…1.
        image_std: What it divides them by.
    """

    model_type = "linmu_mini_vlm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 576
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    image_mean: tuple[float, ...] | list[float] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] | list[float] = tuple(OPENAI_CLIP_STD)


class Projector(nn.Sequential):
    """Features of a token [..., 1728] to the decoder's width [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width)
        )


class MiniVLMVisionTower(PreTrainedModel):
    """Stands where the Qwen2-VL models have their vision transformer, and is called as it is."""

    config_class = MiniVLMVisionConfig
    config: MiniVLMVisionConfig
    main_input_name = "hidden_states"
    _no_split_modules = ["Block"]  # noqa: RUF012 - of the base's type
    scale: Tensor
    shift: Tensor

    def __init__(self, config: MiniVLMVisionConfig) -> None:
        super().__init__(config)
        token = config.patch_size * config.spatial_merge_size
        if token != STRIDE or config.temporal_patch_size != 1:
            raise GridError(
                f"patches of {config.patch_size} pixels, merged {config.spatial_merge_size} a side, and "
                f"{config.temporal_patch_size} frames make tokens of {token} pixels; the network's are {STRIDE}, each "
                "of one frame: take 16, 2 and 1."
            )
        self.spatial_merge_size = config.spatial_merge_size
        self.encoder = EfficientNetLite0()
        self.projector = Projector(config.hidden_size)
        # From the image processor's colours to (RGB of 0…255 - 127) / 128.
        self.register_buffer("scale", torch.empty(CHANNELS, 1, 1))
        self.register_buffer("shift", torch.empty(CHANNELS, 1, 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif module is self:
            mean, std = torch.tensor(self.config.image_mean), torch.tensor(self.config.image_std)
            init.copy_(self.scale, (255 * std / 128).view(-1, 1, 1))
            init.copy_(self.shift, ((255 * mean - 127) / 128).view(-1, 1, 1))

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images and videos.

        Args:
            hidden_states: Patches [patches, 3·16·16] in the order of the Qwen2-VL image processor.
            grid_thw: int [clips, 3], frames, rows and columns of patches.
            **kwargs: What transformers hands to a vision transformer; not read.

        Returns:
            ``last_hidden_state`` [tokens, 1728], the network's features, normed, and ``pooler_output``
            [tokens, D], projected. A token stands for 32×32 pixels; tokens are in raster order, clip after clip.

        Raises:
            GridError: A side is no whole number of tokens, or the patches are more or fewer than the grids'.
        """
        grids: list[list[int]] = grid_thw.tolist()
        self._check(hidden_states, grids)
        clips = hidden_states.split([t * h * w for t, h, w in grids])
        features: dict[int, Tensor] = {}
        for side in dict.fromkeys((h, w) for _, h, w in grids):
            same = [number for number, (_, *hw) in enumerate(grids) if tuple(hw) == side]
            frames = self._frames(torch.cat([clips[number] for number in same]), *side)
            tokens = torch.cat([self._features(part) for part in frames.split(FRAMES)])
            features |= zip(same, tokens.split([grids[number][0] for number in same]))
        states = torch.cat([features[number].flatten(0, 1) for number in range(len(grids))])
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.projector(states))

    def _check(self, patches: Tensor, grids: list[list[int]]) -> None:
        size, merge = self.config.patch_size, self.config.spatial_merge_size
        wanted = (sum(t * h * w for t, h, w in grids), CHANNELS * size**2)
        if tuple(patches.shape) != wanted:
            raise GridError(
                f"the patches are {tuple(patches.shape)}, but grids {grids} ask for {wanted}; make both with "
                f"the same image processor, of patch_size {size} and temporal_patch_size 1."
            )
        for t, h, w in grids:
            if t < 1 or h < merge or w < merge or h % merge or w % merge:
                raise GridError(
                    f"a grid of {(t, h, w)} is no whole number of tokens: height and width must be positive "
                    f"multiples of {merge} patches; resize the image to multiples of {merge * size} pixels."
                )

    def _frames(self, patches: Tensor, h: int, w: int) -> Tensor:
        """[frames·h·w, 3·16·16] to images [frames, 3, 16·h, 16·w]."""
        size, merge = self.config.patch_size, self.config.spatial_merge_size
        patches = patches.view(-1, h // merge, w // merge, merge, merge, CHANNELS, size, size)
        images = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, CHANNELS, h * size, w * size)
        return images * self.scale + self.shift

    def _features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, tokens, 1728].

        The maps are brought to the same size: as they are, the middle one is five times as large as the last. The
        network runs on a power of two of images, for it is planned anew for each number that it has not seen.
        """
        count = len(images)
        empty = images.new_zeros(2 ** (count - 1).bit_length() - count, *images.shape[1:])
        middle, last = (maps[:count] for maps in self.encoder(torch.cat([images, empty])))
        maps = (F.pixel_unshuffle(middle, 2).flatten(2), last.flatten(2))
        return torch.cat([F.layer_norm(x.transpose(1, 2), x.shape[1:2]) for x in maps], dim=-1)
