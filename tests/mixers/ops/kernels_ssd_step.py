"""What the one-token step's kernel is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers.ops.ssd_step.triton import ssd_step


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width, values in ((128, 128), (256, 128), (16, 32)):
            for states in (4, 28):
                name = f"ssd_step {dtype} {width} {values} {states}"
                yield name, call(dtype, width, values, states, False)
                yield f"{name} denominator", call(dtype, width, values, states, True)
    yield "ssd_step, rows apart", call(torch.bfloat16, 256, 128, 4, True, apart=3)


def call(
    dtype: torch.dtype, width: int, values: int, states: int, denominator: bool, *, apart: int = 0
) -> Callable[[], None]:
    def run() -> None:
        c, gate = (torch.zeros(2, 28, n, dtype=dtype) for n in (width, values))
        b, x = (torch.zeros(2, 4, n, dtype=dtype) for n in (width, values))
        decay = (torch.zeros(2, states), torch.zeros(2, states))
        state = torch.zeros(2, states, width, values + denominator + apart)[..., : values + denominator]
        weight = None if denominator else torch.zeros(28, values, dtype=dtype)
        ssd_step(
            c, b, x, decay, state, denominator=denominator, skip=torch.zeros(28, dtype=dtype),
            norm_weight=weight, gate=None if denominator else gate,
        )  # fmt: skip

    return run
