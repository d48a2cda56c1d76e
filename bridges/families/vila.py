"""VILA and NVILA, experimental: their top class is remote code around a whole Qwen2 model.

The descriptor was written to that code and tested on a local model of its structure; the real checkpoints have
not been run. Not covered: packing in training (refused), and tiles of video frames, each of which is read as a
frame.
"""

from __future__ import annotations

import functools
import math
import types
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bridges.errors import BridgeError, LayoutCaptureError, UnknownFamilyError
from bridges.families.family import Clips, Family, register_family
from bridges.families.grids import raster
from bridges.families.vision import ClipTable

Grid = tuple[int, int, int]


@register_family("vila")
class Vila(Family):
    """``VILAForCausalLM``: convert its ``llm``, a ``Qwen2ForCausalLM``, and let :func:`watch_media` join the two."""

    def layers(self, model: PreTrainedModel) -> NoReturn:
        """Refuse the shell; see the class."""
        raise UnknownFamilyError(
            f"{type(model).__name__} is a shell around a whole model: convert model.llm by replace_attention, then "
            "call bridges.families.vila.watch_media(model)."
        )


def watch_media(model: Any) -> None:
    """Let the converted ``llm`` of a VILA model know where images and videos stand.

    Call it once, after ``replace_attention(model.llm, ...)`` or ``model.llm = load_pretrained(...)``.

    Args:
        model: A ``VILAForCausalLM`` with ``llm``, ``vision_tower``, ``encoders``, ``tokenizer`` and ``_embed``.

    Raises:
        BridgeError: It has other parts, or its ``llm`` is not converted.
    """
    parts = ("llm", "vision_tower", "encoders", "tokenizer", "pad_token_list", "_embed")
    if missing := [name for name in parts if not hasattr(model, name)]:
        raise BridgeError(
            f"{type(model).__name__} has no {', '.join(missing)}, so it is no VILA model as known here."
        )
    if not hasattr(model.llm, "layout_capture"):
        raise BridgeError(
            "convert model.llm by replace_attention first; watch_media then tells it where vision stands."
        )
    model._embed = types.MethodType(_embed_and_tell, model)


def _embed_and_tell(
    self: Any, input_ids: Tensor, media: Any, media_config: Any, labels: Any, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as the class's ``_embed`` does, and remember what the encoders made of the media."""
    grids: dict[str, list[tuple[Grid, int, int]]] = {}
    handles = [
        encoder.register_forward_hook(functools.partial(_note, grids, name, self))
        for name, encoder in self.encoders.items()
        if media and media.get(name)
    ]
    try:
        embeddings, labels, mask = type(self)._embed(
            self, input_ids, media, media_config, labels, attention_mask
        )
    finally:
        for handle in handles:
            handle.remove()
    self.llm.layout_capture.foretell(embeddings, _clips(self, input_ids, attention_mask, mask, grids))
    return embeddings, labels, mask


def _note(
    grids: dict[str, list[tuple[Grid, int, int]]],
    name: str,
    model: Any,
    encoder: Any,
    args: Any,
    features: Any,
) -> None:
    """Forward hook of an encoder: work out (grid, tokens before a frame, tokens after it) of each image or video."""
    before, after, last = (
        _count(model, getattr(encoder, kind, None)) for kind in ("start_tokens", "end_tokens", "sep_tokens")
    )
    items, config = args
    blocks = (config or {}).get("block_sizes") or [None] * len(items)
    pools = getattr(encoder, "pool_sizes", [(1, 1, 1)])
    for item, block, tokens in zip(items, blocks, map(len, features)):
        if name == "video":
            frames, (rows, columns) = len(item) // pools[0][0], (1, 1)
        else:
            frames, (rows, columns) = 1, block if block and _keeps_blocks(model.vision_tower) else (1, 1)
        size = (tokens - last) / frames - before - after
        side = math.isqrt(max(int(size), 0) // (rows * columns))
        if len(pools) != 1 or side == 0 or side**2 * rows * columns != size:
            raise LayoutCaptureError(
                f"{name} features of {tokens} tokens are no {frames} frames of {rows} × {columns} squares with "
                f"{before + after} tokens of text each, which is how VILA's encoders are known to lay them out."
            )
        grids.setdefault(name, []).append(((frames, rows * side, columns * side), before, after))


def _count(model: Any, text: str | None) -> int:
    return 0 if text is None else len(model.tokenizer(text).input_ids)


def _keeps_blocks(tower: Any) -> bool:
    """Whether features of several scales are resized to those of the last, which follows the image's aspect."""
    return getattr(tower, "resize_output_to_scale_idx", 0) in (-1, len(getattr(tower, "scales", ())) - 1)


def _clips(
    model: Any, input_ids: Tensor, given: Tensor | None, mask: Tensor, grids: dict[str, Any]
) -> Clips | None:
    """Follow how media take the places of their tokens, padding tokens are left out, and rows are padded again."""
    table = ClipTable(torch.zeros(mask.shape, dtype=torch.long))
    names = {token: name for name, token in model.tokenizer.media_token_ids.items()}
    left = {name: iter(found) for name, found in grids.items()}
    for row, ids in enumerate(input_ids.tolist()):
        ids = ids if given is None else ids[: int(given[row].sum())]
        valid = mask[row].nonzero().flatten()
        at = int(valid[0])
        in_text = False
        for token in ids:
            if token in names:
                at = _place(table, row, at, *next(left[names[token]]))
            elif in_text or token not in model.pad_token_list:
                at += 1
            in_text = token not in names and (in_text or token not in model.pad_token_list)
        if at != int(valid[-1]) + 1:
            raise LayoutCaptureError(
                f"row {row} has {len(valid)} embeddings, but its tokens and media make {at - int(valid[0])}; it may "
                "have been cut to the tokenizer's model_max_length, or be padded on the left."
            )
    return Clips(table.clip.to(mask.device), table.coords.to(mask.device))


def _place(table: ClipTable, row: int, at: int, grid: Grid, before: int, after: int) -> int:
    frames, size = grid[0], grid[1] * grid[2]
    starts = at + before + torch.arange(frames) * (before + size + after)
    table.add(row, (starts[:, None] + torch.arange(size)).flatten(), raster(*grid))
    return at + frames * (before + size + after)
