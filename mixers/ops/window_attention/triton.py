"""Attention over gather tables in one kernel: rows gathered by index, rotated while loaded, scattered by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.blocks import Blocks
from mixers.ops import triton_support
from mixers.ops.window_attention.backward import window_backward_kernel, key_backward_kernel, query_backward_kernel
from mixers.ops.window_attention.forward import forward_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Rotary = tuple[Tensor, Tensor]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | Sequence[Blocks],
    *,
    scale: float,
    key_valid: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Let each query of a block attend to the block's keys; see the reference."""
    tables = [blocks] if isinstance(blocks, Blocks) else list(blocks)
    if not tables:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    cos, sin = (None, None) if rotary is None else (t.contiguous() for t in rotary)
    asked = [b.count for b in tables]
    complete = None not in asked and sum(asked) == q.shape[0] * q.shape[1]  # type: ignore[arg-type]
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    turned = [transposed(b) for b in tables] if learns else []
    y, _ = forward(
        q, k, v, _flat(tables), _flat(turned), key_valid, cos, sin, scale, complete
    )
    return y
