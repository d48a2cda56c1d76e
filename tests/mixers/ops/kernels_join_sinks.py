"""What the kernels that join attention sinks are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers.ops.join_sinks.triton import join_sinks


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (128, 96, 32):
            yield f"join_sinks {dtype} {width}", call(dtype, width)


def call(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def run() -> None:
        q, y = (torch.zeros(1, 40, 28, width, dtype=dtype, requires_grad=True) for _ in range(2))
        k, v = (torch.zeros(1, 1, 4, 4, width, dtype=dtype, requires_grad=True) for _ in range(2))
        hidden = torch.zeros(1, 40, 4, dtype=torch.bool)
        join_sinks(q, y, torch.zeros(1, 40, 28), k, v, hidden, scale=0.1).sum().backward()

    return run
