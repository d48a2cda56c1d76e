"""Softmax attention inside small groups of tokens: 3-D windows and the causal text window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixers.blocks import Blocks
from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.window_attention import reference

WIDEST = 256
"""Most channels of a head that the Triton kernels take."""


def _triton_unsupported(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | Sequence[Blocks], **others: Any
) -> str | None:
    if q.shape[3] > WIDEST:
        return f"heads are {q.shape[3]} wide; its kernels take at most {WIDEST}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are of several types: {q.dtype}, {k.dtype}, {v.dtype}"
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    tables = [blocks] if isinstance(blocks, Blocks) else blocks
    if learns and any(table.transposed is None for table in tables):
        return "a table was made while gradients were disabled, and lacks its transpose"
    return triton_support.off_device(q, k, v, *(others.get("rotary") or ()))


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.window_attention.triton import block_attention as run

    return run(*args, **kwargs)


block_attention = Op("block_attention")
block_attention.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_triton_unsupported,
    hesitates=triton_support.hesitates,
)(_triton)
block_attention.backend("reference")(reference.block_attention)
