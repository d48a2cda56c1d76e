"""Softmax attention inside small groups of tokens: 3-D windows and the causal text window."""

from __future__ import annotations

import importlib.util
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

FLEX_NARROWEST = 16
"""Fewest that flex_attention takes."""


def _triton_unsupported(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | Sequence[Blocks], **others: Any
) -> str | None:
    if q.shape[3] > WIDEST:
        return f"heads are {q.shape[3]} wide; its kernels take at most {WIDEST}"
    if not (q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled(q.device.type)):
        return f"q, k and v are of several types: {q.dtype}, {k.dtype}, {v.dtype}"
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    tables = [blocks] if isinstance(blocks, Blocks) else blocks
    if learns and any(table.transposed is None for table in tables):
        return "a table was made while gradients were disabled, and lacks its transpose"
    return triton_support.off_device(q, k, v, *(others.get("rotary") or ()))


def _triton(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    from mixers.ops.window_attention.triton import block_attention as run

    return run(*args, **kwargs)


def _flex_unavailable() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device, and it has no gradients without"


def _flex_unsupported(q: Tensor, k: Tensor, v: Tensor, *others: Any, **more: Any) -> str | None:
    if q.device.type != "cuda":
        return f"a tensor is on {q.device}, not on a CUDA device"
    if q.shape[3] < FLEX_NARROWEST:
        return f"heads are {q.shape[3]} wide; flex_attention takes {FLEX_NARROWEST} at least"
    if more.get("with_lse"):
        return "its log-sum-exp is not used here"
    return "flex_attention has no float64" if q.dtype == torch.float64 else None


def _flex(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.window_attention.flex import block_attention as run

    return run(*args, **kwargs)


def _xformers_unavailable() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; pip install 'linmu[xformers]'"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def _xformers_unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | Sequence[Blocks],
    *,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
    **others: Any,
) -> str | None:
    if q.device.type != "cuda":
        return f"a tensor is on {q.device}, not on a CUDA device"
    if any(table.first is not None for table in ([blocks] if isinstance(blocks, Blocks) else blocks)):
        return "it is used for whole windows only; in a text window each query sees its own span of keys"
    if key_valid is not None:
        return "it takes no mask of valid keys"
    if softcap is not None:
        return "it has no soft-cap of the scores"
    if with_lse:
        return "it tells no log-sum-exp of windows"
    return (
        None
        if q.dtype in (torch.bfloat16, torch.float16)
        else f"q is {q.dtype}; it takes bfloat16 and float16"
    )


def _xformers(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.window_attention.xformers import block_attention as run

    return run(*args, **kwargs)


block_attention = Op("block_attention")
block_attention.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_triton_unsupported,
    hesitates=triton_support.hesitates,
)(_triton)
block_attention.backend("reference")(reference.block_attention)
block_attention.backend("flex", unavailable=_flex_unavailable, unsupported=_flex_unsupported)(_flex)
block_attention.backend("xformers", unavailable=_xformers_unavailable, unsupported=_xformers_unsupported)(
    _xformers
)
