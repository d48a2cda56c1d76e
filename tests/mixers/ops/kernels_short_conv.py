"""What the short convolution's kernels are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers import TokenLayout
from mixers.ops.short_conv.triton import short_conv

LAYOUT = TokenLayout.from_grids(40, [[(3, (2, 3, 4))]])


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for taps, width in ((4, 4608), (2, 48), (8, 512)):
            for axes in ("thw", "wht"):
                yield f"short_conv {dtype} {taps} {width} {axes}", call(dtype, taps, width, axes)
        yield f"short_conv {dtype} with history", call(dtype, 4, 512, "thw", history=True)


def call(
    dtype: torch.dtype, taps: int, width: int, axes: str, *, history: bool = False
) -> Callable[[], None]:
    def run() -> None:
        x = torch.zeros(1, 40, width, dtype=dtype, requires_grad=True)
        weight = torch.zeros(width, taps, dtype=dtype, requires_grad=True)
        before = torch.zeros(1, taps - 1, width, dtype=dtype) if history else None
        y = short_conv(x, weight, scan=LAYOUT.scan(axes), history=before)
        y.sum().backward()

    return run
