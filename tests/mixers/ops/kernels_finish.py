"""What the kernels that finish a scan are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers.ops.finish.triton import finish


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (128, 96, 64, 32):
            for norm, gate in ((True, True), (False, False)):
                yield f"finish {dtype} {width} {norm}", call(dtype, width, norm, gate)
    yield "finish, gate alone", call(torch.bfloat16, 128, False, True)


def call(dtype: torch.dtype, width: int, norm: bool, gate: bool) -> Callable[[], None]:
    def run() -> None:
        y, z = (torch.zeros(1, 40, 28, width, dtype=dtype, requires_grad=True) for _ in range(2))
        v = torch.zeros(1, 40, 4, width, dtype=dtype, requires_grad=True)
        weight = torch.zeros(28, width, dtype=dtype, requires_grad=True) if norm else None
        skip = torch.zeros(28, dtype=dtype)
        finish(y, v, skip, norm_weight=weight, gate=z if gate else None).sum().backward()

    return run
