"""The mini VLM's classes: Qwen2-VL with a convolutional vision tower. Importing this registers them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLTextModel

from bridges.families import register_family
from bridges.families.grids import raster
from bridges.families.qwen2_vl import Qwen2VL
from recipes.data.visual import IMAGE, VIDEO
from recipes.mini_vlm.tower import GridError, MiniVLMVisionConfig, MiniVLMVisionTower

SUB_CONFIGS: dict[str, Any] = {"vision_config": MiniVLMVisionConfig, "text_config": Qwen2VLTextConfig}


class MiniVLMConfig(Qwen2VLConfig):
    """Qwen2-VL's config with :class:`MiniVLMVisionConfig` as its ``vision_config``."""

    model_type = "linmu_mini_vlm"
    vision_config: Any = None
    text_config: Any = None
    if hasattr(Qwen2VLConfig, "sub_configs_defaults"):
        sub_configs_defaults = SUB_CONFIGS
    else:  # transformers before 5.23
        sub_configs = SUB_CONFIGS


class MiniVLMModel(Qwen2VLModel):
    """Qwen2-VL's body with :class:`MiniVLMVisionTower` as ``visual``.

    What follows a video stands after its last frame, as Qwen2-VL (arXiv 2409.12191) has it. In transformers 5
    it stands amid the video, a frame's side after its start, and elsewhere in a step with a cache.
    """

    config_class = MiniVLMConfig
    config: MiniVLMConfig

    def __init__(self, config: MiniVLMConfig) -> None:
        super(Qwen2VLModel, self).__init__(config)
        self.visual = MiniVLMVisionTower._from_config(config.vision_config)
        self.language_model = Qwen2VLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Say where tokens stand for the rotary embedding.

        Args:
            input_ids: [B, N].
            mm_token_type_ids: [B, N], 0 at text, 1 at images, 2 at videos.
            image_grid_thw: [images, 3] in patches.
            video_grid_thw: [videos, 3] in patches.
            attention_mask: [B, N], 0 at padding.
            **kwargs: Not read.

        Returns:
            Positions (t, h, w) [3, B, N], and what to add to the token's number in the row to go on [B, 1].

        Raises:
            GridError: There are more images or videos than grids, or one has not its grid's tokens.
        """
        given = {IMAGE: image_grid_thw, VIDEO: video_grid_thw}
        grids = {kind: iter([] if grid is None else grid.tolist()) for kind, grid in given.items()}
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        deltas = []
        for row, (kinds, kept) in enumerate(zip(mm_token_type_ids.cpu(), valid.bool().cpu())):
            parts = list(self._positions(kinds[kept], grids))
            positions[:, row, kept] = torch.cat(parts, dim=1)
            deltas.append([int(parts[-1].max()) + 1 - int(kept.sum())])
        return positions.to(input_ids.device), torch.tensor(deltas, device=input_ids.device)

    def _positions(self, kinds: Tensor, grids: dict[int, Iterator[list[int]]]) -> Iterator[Tensor]:
        """Yield the positions [3, n] of each run of one kind in a row."""
        merge = self.config.vision_config.spatial_merge_size
        start = 0
        for kind, length in zip(*(part.tolist() for part in kinds.unique_consecutive(return_counts=True))):
            if kind not in grids:
                run = torch.arange(length).expand(3, -1)
            else:
                t, h, w = next(grids[kind], (0, 0, 0))
                run = raster(t, h // merge, w // merge).T
            if run.shape[1] != length:
                raise GridError(
                    f"{length} {'image' if kind == IMAGE else 'video'} tokens follow each other, but their grid "
                    f"makes {run.shape[1]}; pass a grid for each image and video, with text between them."
                )
            yield run + start
            start += int(run.max()) + 1


class MiniVLMForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """:class:`MiniVLMModel` with an output head."""

    config_class = MiniVLMConfig
    config: MiniVLMConfig

    def __init__(self, config: MiniVLMConfig) -> None:
        super(Qwen2VLForConditionalGeneration, self).__init__(config)
        self.model = MiniVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


@register_family(MiniVLMConfig.model_type)
class MiniVLM(Qwen2VL):
    """``MiniVLMForConditionalGeneration``: its tokens are laid out as Qwen2-VL's."""


AutoConfig.register(MiniVLMConfig.model_type, MiniVLMConfig, exist_ok=True)
AutoModel.register(MiniVLMConfig, MiniVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(MiniVLMConfig, MiniVLMForConditionalGeneration, exist_ok=True)
