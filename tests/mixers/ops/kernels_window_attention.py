"""Calls of the window attention that :mod:`compile_kernels` compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers import TokenLayout
from mixers.ops.window_attention.triton import block_attention

HALF = (torch.bfloat16, torch.float16)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    video = TokenLayout.from_grids(300, [[(6, (4, 8, 8))]])
    both = [video.windows((4, 4, 4)), video.recent(128, text_only=True)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (128,) if dtype == torch.float16 else (32, 64, 96, 128, 256):
            yield f"both {dtype} {width}", _call(video, both, dtype, width)
    bf16 = torch.bfloat16
    for size in ((2, 2, 2), (4, 4, 8), (8, 8, 8)):
        yield f"windows {size}", _call(video, [video.windows(size)], bf16, 128)
    yield "without rotary", _call(video, both, bf16, 128, turned=0)
    yield "part rotary", _call(video, both, bf16, 128, turned=64)
    yield "soft-cap", _call(video, both, bf16, 128, softcap=50.0)
    yield "soft-cap, windows", _call(video, [video.windows((4, 4, 4))], bf16, 128, softcap=50.0)
    yield "with log-sum-exp", _call(video, both, bf16, 128, with_lse=True)
    yield (
        "with history",
        _call(video, [video.recent(128, text_only=False, history=127)], bf16, 128, history=127),
    )


def _call(
    layout: TokenLayout,
    blocks: list[Any],
    dtype: torch.dtype,
    width: int,
    *,
    turned: int | None = None,
    history: int = 0,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Callable[[], Any]:
    def call() -> None:
        q, k, v = (
            torch.randn(1, n, h, width).to(dtype).requires_grad_()
            for n, h in ((layout.length, 28), (layout.length + history, 4), (layout.length + history, 4))
        )
        angles = torch.randn(1, layout.length, width if turned is None else turned).to(dtype)
        rotary = (angles.cos(), angles.sin()) if turned != 0 else None
        key_valid = torch.ones(k.shape[:2], dtype=torch.bool) if history else None
        options = {"key_valid": key_valid, "rotary": rotary, "softcap": softcap}
        found = block_attention(q, k, v, blocks, scale=0.1, with_lse=with_lse, **options)
        sum(t.float().sum() for t in (found if with_lse else [found])).backward()

    return call
