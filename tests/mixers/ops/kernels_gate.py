"""What the kernels of the gate are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers.ops.gate.triton import weighted_sum


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (128, 96, 32):
            for heads in (1, 28):
                yield f"weighted_sum {dtype} {width} {heads}", call(dtype, width, heads)


def call(dtype: torch.dtype, width: int, heads: int) -> Callable[[], None]:
    def run() -> None:
        ys = [torch.zeros(1, 40, 28, width, dtype=dtype, requires_grad=True) for _ in range(2)]
        weights = torch.zeros(1, 40, 2, heads, dtype=dtype)
        weighted_sum(ys, [weights[:, :, i, :, None] for i in range(2)]).sum().backward()

    return run
