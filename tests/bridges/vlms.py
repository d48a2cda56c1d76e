"""Tiny random teachers that see, and batches for them: ids and pixels laid out as their processors do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llava_next_video.modeling_llava_next_video import get_anyres_image_grid_shape

from tests.bridges import models
from tests.bridges.models import END, IMAGE, MERGE, PAD, START, VIDEO, Inputs, ready, text_fields

PATCH, TILE = 4, 16
SIDE = TILE // PATCH
LINE_BREAK, BLANK_LINE, FRAME, COLON, WHOLE, NAME = 111, 110, 112, 113, 124, 125
DIGIT, TILE_NAME = 100, 114  # the first of ten digits, the first of six tile names

Segment = int | tuple[str, Any]
"""A token, or an image or video: ``(kind, what it is)``, see :data:`ROWS`."""

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]


def qwen2_vl(**changes: Any) -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    grid = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    text = text_fields(rope_parameters=ROPE, **changes)
    config = Qwen2VLConfig(text_config=text, vision_config={**vision, **grid}, **TOKENS, **MARKS)
    return ready(Qwen2VLForConditionalGeneration(config))


def qwen3_vl(**changes: Any) -> PreTrainedModel:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2}
    grid = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    depths = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text = text_fields(head_dim=16, rope_parameters={**ROPE, "mrope_interleaved": True}, **changes)
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, **grid, **depths}, **TOKENS, **MARKS)
    return ready(Qwen3VLForConditionalGeneration(config))


def llava_onevision(**changes: Any) -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_fields(**changes)),
        vision_config=SiglipVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, vision_use_head=False),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_3",
        **TOKENS,
    )
    return ready(LlavaOnevisionForConditionalGeneration(config))


def llava_next_video(**changes: Any) -> PreTrainedModel:
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text_fields(**changes)),
        vision_config=CLIPVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, projection_dim=32),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        spatial_pool_stride=2,
        **TOKENS,
    )
    return ready(LlavaNextVideoForConditionalGeneration(config))


def smolvlm(**changes: Any) -> PreTrainedModel:
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, **changes)


def idefics3(**changes: Any) -> PreTrainedModel:
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, **changes)


def _idefics(config_class: Any, model_class: Any, **changes: Any) -> PreTrainedModel:
    config = config_class(
        text_config=LlamaConfig(**text_fields(**changes)),
        vision_config={**TOWER, "image_size": TILE, "patch_size": PATCH},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    return ready(model_class(config))


def internvl(**changes: Any) -> PreTrainedModel:
    config = InternVLConfig(
        text_config=Qwen2Config(**text_fields(**changes)),
        vision_config={**TOWER, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    return ready(InternVLForConditionalGeneration(config))


def paligemma(**changes: Any) -> PreTrainedModel:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text_fields(head_dim=16, **changes)),
        vision_config=SiglipVisionConfig(
            **TOWER, image_size=TILE, patch_size=PATCH, projection_dim=64, vision_use_head=False
        ),
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return ready(PaliGemmaForConditionalGeneration(config))


def gemma3(**changes: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    text = text_fields(head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=kinds)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**{**text, **changes}),
        vision_config=SiglipVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return ready(Gemma3ForConditionalGeneration(config))


VLMS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": models.qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "internvl": internvl,
    "paligemma": paligemma,
    "gemma3": gemma3,
}

_QWEN = [
    [1, ("image", (1, 4, 6)), 5, ("video", (2, 4, 6)), 9, 10, 11],
    [1, ("image", (1, 4, 4)), 3, ("image", (1, 8, 6)), 14],
]
_LLAVA = [
    [1, 5, ("image", (20, 30)), 6, ("video", 2), 9, 10, 11],
    [1, ("image", (40, 10)), 7, 8, 14],
]
_TILES = [
    [1, 5, ("image", (2, 2)), 6, ("video", 3), 9, 10, 11],
    [1, ("image", (0, 0)), 7, ("image", (1, 2)), 14],
]
ROWS: dict[str, list[list[Segment]]] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava_onevision": _LLAVA,
    "llava_next_video": _LLAVA,
    "smolvlm": _TILES,
    "idefics3": _TILES,
    "internvl": [
        [1, 5, ("image", 3), 6, ("video", 3), 9, 10, 11],
        [1, ("image", 1), 7, ("image", 1), 14],
    ],
    "paligemma": [
        [("image", None), ("image", None), 1, 5, 6, 7],
        [("image", None), 1, 8],
    ],
    "gemma3": [
        [1, 5, ("image", None), 6, 7, ("image", None), 9, 10],
        [1, ("image", None), 7, 8, 14],
    ],
}
"""Two rows a family: grids in patches (Qwen), image sizes in pixels (LLaVA), rows and columns of tiles
(SmolVLM, Idefics3; (0, 0) for an image that is not cut), tiles of an image (InternVL); frames of a video."""


def batch(family: str, *, padded: bool = True) -> Inputs:
    """Return a batch that the family's teacher reads; padded on the left if asked."""
    return collate(family, ROWS[family] if padded else ROWS[family][:1])


def row_of(family: str, row: int) -> Inputs:
    """Return one row of ``batch(family)`` alone, without its padding."""
    return collate(family, [ROWS[family][row]])


def teacher(family: str) -> Any:
    """Return a fresh copy of the family's tiny teacher."""
    return copy.deepcopy(_teacher(family))


@functools.cache
def _teacher(family: str) -> Any:
    return VLMS[family]()


def collate(family: str, rows: Sequence[Sequence[Segment]], *, painted: bool = False) -> Inputs:
    """Build a batch, padded on the left.

    Args:
        family: A key of :data:`VLMS`.
        rows: Tokens, images and videos.
        painted: Whether each pixel tells its place, (16 · segment + frame, y, x) with y and x in patches,
            in the place of noise. Either way it does not depend on the other rows.
    """
    ids: list[list[int]] = []
    seen: dict[str, list[list[Tensor]]] = {}
    for row in rows:
        images = sum(segment[0] == "image" for segment in row if not isinstance(segment, int))
        ids.append([])
        for number, segment in enumerate(row, start=1):
            if isinstance(segment, int):
                ids[-1].append(segment)
                continue
            paint = functools.partial(paint_place if painted else noise, number)
            tokens, pixels = _see(family, *segment, paint, images)
            ids[-1] += tokens
            for name, tensor in pixels.items():
                per_row = seen.setdefault(name, [[] for _ in rows])
                per_row[len(ids) - 1].append(tensor)
    length = max(map(len, ids))
    table = torch.tensor([[PAD] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    return {"input_ids": table, "attention_mask": mask, **_types(family, table), **_join(family, seen)}


def _types(family: str, ids: Tensor) -> Inputs:
    if family.startswith("qwen"):
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO)}
    if family == "gemma3":
        return {"token_type_ids": (ids == IMAGE).long()}
    return {"token_type_ids": torch.zeros_like(ids)} if family == "paligemma" else {}


def _join(family: str, seen: dict[str, list[list[Tensor]]]) -> Inputs:
    """Join the pixels of rows as the family's processor does."""
    inputs = {}
    for name, rows in seen.items():
        flat = [tensor for row in rows for tensor in row]
        if name == "pixel_values" and family in ("smolvlm", "idefics3"):
            inputs[name] = _stack([torch.cat([*row, torch.zeros(0, 3, TILE, TILE)]) for row in rows])
        elif name == "pixel_values" and family.startswith("llava"):
            inputs[name] = _stack(flat)
        elif name == "pixel_values" or (family.startswith("qwen") and "pixel" in name):
            inputs[name] = torch.cat(flat)
        else:
            inputs[name] = torch.stack(flat)
    if family == "llava_onevision" and "image_sizes" in seen:
        inputs["batch_num_images"] = torch.tensor([len(row) for row in seen["image_sizes"] if row])
    return inputs


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    most = max(map(len, tensors))
    return torch.stack([F.pad(one, (0,) * 7 + (most - len(one),)) for one in tensors])


def paint_place(number: int, t: int, height: int, width: int, top: int = 0, left: int = 0) -> Tensor:
    """Paint [3, height, width] pixels with their own place."""
    y = (torch.arange(height) // PATCH + top).float()[:, None].expand(height, width)
    x = (torch.arange(width) // PATCH + left).float().expand(height, width)
    return torch.stack([torch.full_like(y, 16.0 * number + t), y, x])


def noise(*place: int) -> Tensor:
    factors = torch.tensor([[1.3, 2.1, 3.7], [2.9, 0.7, 1.9], [0.3, 4.1, 2.3]])
    return torch.sin(torch.einsum("dc,chw->dhw", factors, paint_place(*place)))


def _see(family: str, kind: str, what: Any, paint: Any, images: int) -> tuple[list[int], Inputs]:
    """Return the tokens of an image or video and what comes with them."""
    if family.startswith("qwen"):
        return _see_grid(kind, what, paint, timestamps=family == "qwen3_vl")
    if family.startswith("llava"):
        return _see_anyres(family, kind, what, paint, alone=images == 1 or family != "llava_onevision")
    if family in ("smolvlm", "idefics3"):
        ids, tiles = _see_tiles(family, kind, what, paint)
    elif family == "internvl":
        count = what
        tiles = [paint(t, TILE, TILE) for t in range(count)]
        whole = [START, *[IMAGE] * (count * 4), END]
        frames = [
            i for t in range(count) for i in (FRAME, DIGIT + t, COLON, START, *[IMAGE] * 4, END, LINE_BREAK)
        ]
        ids = whole if kind == "image" else frames
    else:
        tiles = [paint(0, TILE, TILE)]
        ids = [IMAGE] * SIDE**2 if family == "paligemma" else [START, *[IMAGE] * 4, END]
    return ids, {"pixel_values": torch.stack(tiles)}


def _see_grid(
    kind: str, grid: tuple[int, int, int], paint: Any, *, timestamps: bool
) -> tuple[list[int], Inputs]:
    t, h, w = grid
    patches = []
    for frame in range(t):
        pixels = paint(frame, h * PATCH, w * PATCH).expand(2, -1, -1, -1)  # two frames a temporal patch
        blocks = pixels.reshape(2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
        patches.append(blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(h * w, -1))
    count, token = h * w // MERGE**2, IMAGE if kind == "image" else VIDEO
    ids = [START, *[token] * (t * count), END]
    if kind == "video" and timestamps:
        ids = [i for frame in range(t) for i in (DIGIT + frame, COLON, START, *[token] * count, END)]
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    return ids, {name: torch.cat(patches), f"{kind}_grid_thw": torch.tensor(grid)}


def _see_anyres(family: str, kind: str, what: Any, paint: Any, *, alone: bool) -> tuple[list[int], Inputs]:
    if kind == "video":
        pixels = torch.stack([paint(t, TILE, TILE) for t in range(what)])
        return [VIDEO] * (what * 4 + (family == "llava_onevision")), {"pixel_values_videos": pixels}
    tiles = [paint(0, TILE, TILE)]
    if alone:
        rows, columns = get_anyres_image_grid_shape(what, PINPOINTS, TILE)
        tiles += [paint(1, TILE, TILE, r * SIDE, c * SIDE) for r in range(rows) for c in range(columns)]
    settings: dict[str, Any] = {"image_sizes": [what], "image_newline": torch.zeros(64)}
    key = {"llava_onevision": "vision_aspect_ratio", "llava_next_video": "vision_feature_select_strategy"}[
        family
    ]
    model = _teacher(family).model
    features = torch.zeros(len(tiles), SIDE**2, 64)
    packed, _ = model.pack_image_features([features], **settings, **{key: getattr(model.config, key)})
    pixels = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor(what)}
    return [IMAGE] * len(packed[0]), pixels


def _see_tiles(family: str, kind: str, what: Any, paint: Any) -> tuple[list[int], list[Tensor]]:
    """START stands around every image, and before the name of each tile: a token of its own, or words in Idefics3."""
    whole = [START, *([WHOLE] if family == "smolvlm" else [WHOLE, NAME, COLON]), *[IMAGE] * 4, START]
    if kind == "video":
        tiles = [paint(t, TILE, TILE) for t in range(what)]
        return [i for t in range(what) for i in (LINE_BREAK, FRAME, DIGIT + t, COLON, *whole)], tiles
    ids, tiles = [], []
    rows, columns = what
    for r in range(rows):
        for c in range(columns):
            name = (
                [TILE_NAME + r * columns + c]
                if family == "smolvlm"
                else [NAME, DIGIT + r, NAME, DIGIT + c, COLON]
            )
            ids += [START, *name, *[IMAGE] * 4]
            tiles.append(paint(1, TILE, TILE, r * SIDE, c * SIDE))
        ids.append(LINE_BREAK if r < rows - 1 else BLANK_LINE)
    return ids + whole, [*tiles, paint(0, TILE, TILE)]
