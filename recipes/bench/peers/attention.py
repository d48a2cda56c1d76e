"""Attention from torch's kernels: of the whole row, in windows that are copied together, in a sliding window."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixers.blocks import Blocks
from recipes.bench.cases import Inputs, Problem
from recipes.bench.peers.peer import Peer, expanded, needs

WINDOW = 128
"""Tokens of the text window."""


def _heads_first(inputs: Inputs, problem: Problem) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, N, P], of the scan's c, b and x."""
    return tuple(t.transpose(1, 2).contiguous() for t in inputs.args[:3])


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, kernels: list[SDPBackend], causal: bool, scale: float | None
) -> Tensor:
    """Attend on the first of torch's kernels that takes the shapes."""
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=scale)


class Permuted(torch.autograd.Function):
    """Rows [N, …] in another order, one copy forward and one backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return rows[order]."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return gradient[inverse]."""
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


def window_arguments(inputs: Inputs, problem: Problem) -> tuple[Any, ...]:
    """Return q, k, v and the order of tokens that puts windows of one size side by side, smallest first."""
    q, k, v, blocks = inputs.args
    assert isinstance(blocks, Blocks)
    sizes = (blocks.queries >= 0).sum(1)
    by_size = sizes.argsort(stable=True)
    slots = blocks.queries[by_size]
    order = slots[slots >= 0].long()
    counts = [(int(size), int((sizes == size).sum())) for size in sizes.unique()]
    return q, k, v, order, order.argsort(), counts, inputs.kwargs["scale"]


def partitioned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    inverse: Tensor,
    sizes: list[tuple[int, int]],
    scale: float,
    *,
    kernels: list[SDPBackend],
) -> Tensor:
    """Copy windows together, attend within them by one call a size (no window is padded), copy back."""
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    if len(order) < len(rows[0]):  # text stands around the windows
        rows = [t[order] for t in rows]
    else:
        rows = [Permuted.apply(t, order, inverse) for t in rows]
    mixed, start = [], 0
    for size, count in sizes:
        part = slice(start, start + size * count)
        q_, k_, v_ = (t[part].unflatten(0, (count, size)).transpose(1, 2) for t in rows)
        y = _sdpa(q_, k_, v_, kernels=kernels, causal=False, scale=scale)
        mixed.append(y.transpose(1, 2).flatten(0, 1))
        start = part.stop
    whole = torch.cat(mixed)
    if len(order) < q.shape[0] * q.shape[1]:
        return torch.zeros_like(q).flatten(0, 1).index_copy(0, order, whole).view(q.shape)
    return Permuted.apply(whole, inverse, order).view(q.shape)


def partitioned_windows(name: str, *kernels: SDPBackend) -> Peer:
    """Return windows by copying them together, on the first of torch's kernels that takes their sizes."""
    return Peer(
        f"partition + {name} + merge",
        ("windows",),
        needs(),
        window_arguments,
        functools.partial(partitioned, kernels=list(kernels)),
        functools.partial(partitioned, kernels=[SDPBackend.MATH]),
    )


def _flex_arguments(inputs: Inputs, problem: Problem) -> tuple[Any, ...]:
    from torch.nn.attention.flex_attention import create_block_mask

    def sliding(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < WINDOW)

    length = problem.layout.length
    device = problem.layout.device
    compiled = {"_compile": device.type == "cuda"}  # without, the mask of all pairs is made on the way
    mask = create_block_mask(sliding, None, None, length, length, device=str(device), **compiled)
    return (*_heads_first(inputs, problem), _Kept(mask))


@dataclass(frozen=True)
class _Kept:
    """An argument that is no tensor to differentiate or to cast."""

    value: Any


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: _Kept) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=mask.value, enable_gqa=True)


def _sliding_right(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    seen = (at[:, None] >= at) & (at[:, None] - at < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def _varlen_arguments(inputs: Inputs, problem: Problem) -> tuple[Any, ...]:
    q, k, v = (t.flatten(0, 1) for t in inputs.args[:3])
    heads, length = q.shape[1], problem.layout.length
    bounds = torch.tensor([0, length], dtype=torch.int32, device=q.device)
    return q, expanded(k, heads, 1), expanded(v, heads, 1), bounds, length


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    y = varlen_attn(q, k, v, bounds, bounds, length, length, window_size=(WINDOW - 1, 0))
    assert isinstance(y, Tensor)
    return y


def _varlen_unavailable() -> str | None:
    reason = needs("torch.nn.attention.varlen")()
    if reason is None:
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" not in inspect.signature(varlen_attn).parameters:
            return "varlen_attn of this torch has no window_size"
    return reason


def _varlen_right(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return _sliding_right(q, k, v)[0].transpose(0, 1)


ATTENTION_PEERS = (
    Peer(
        "causal attention, cuDNN",
        ("ssd",),
        needs(),
        _heads_first,
        functools.partial(_sdpa, kernels=[SDPBackend.CUDNN_ATTENTION], causal=True, scale=None),
        functools.partial(_sdpa, kernels=[SDPBackend.MATH], causal=True, scale=None),
        another="softmax attention, quadratic in the length",
    ),
    partitioned_windows("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    partitioned_windows("SDPA flash", SDPBackend.FLASH_ATTENTION),
    Peer("flex_attention", ("text_window",), needs(), _flex_arguments, _flex, _sliding_right),
    Peer("flash, varlen", ("text_window",), _varlen_unavailable, _varlen_arguments, _varlen, _varlen_right),
)
"""Stand beside the scan (as a yardstick of another kind), the windows and the text window."""
