"""What the kernels of the feature map are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers.ops.feature_map import feature_map as op
from mixers.ops.feature_map.triton import feature_map


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width, features in ((128, 128), (64, 64), (64, 128), (64, 256), (128, 256), (32, 32)):
            yield f"feature_map {dtype} {width} to {features}", call(dtype, width, features)


def call(dtype: torch.dtype, width: int, features: int) -> Callable[[], None]:
    def run() -> None:
        x = torch.zeros(1, 80, 28, width, dtype=dtype, requires_grad=True)
        weight = torch.zeros(28, width, features, dtype=dtype)
        if op.backends["triton"].unsupported(x, weight) is None:
            feature_map(x, weight).sum().backward()

    return run
