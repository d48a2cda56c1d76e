"""Launches of the SSD kernels to compile: one of each kind that users meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixers import TokenLayout


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, heads, groups, width, values, decays, denominator, both, packed in (
        (torch.bfloat16, 28, 4, 128, 128, 4, False, True, False),
        (torch.bfloat16, 28, 4, 128, 128, 28, False, True, False),
        (torch.bfloat16, 28, 4, 256, 128, 4, True, True, True),
        (torch.bfloat16, 9, 3, 256, 64, 3, True, True, False),  # features twice as wide as a head
        (torch.bfloat16, 9, 3, 512, 64, 3, True, True, False),  # and four times
        (torch.bfloat16, 28, 4, 128, 128, 4, False, False, False),
        (torch.bfloat16, 28, 4, 128, 128, 4, True, True, False),
        (torch.float16, 6, 2, 64, 96, 2, True, True, False),
        (torch.bfloat16, 4, 4, 16, 32, 4, False, True, False),
        (torch.float32, 4, 2, 128, 64, 2, True, True, False),
    ):
        name = f"{dtype} H={heads} G={groups} K={width} P={values} E={decays}{' packed' if packed else ''}"
        yield name, _call(dtype, heads, groups, width, values, decays, denominator, both, packed)


def _call(
    dtype: torch.dtype,
    heads: int,
    groups: int,
    width: int,
    values: int,
    decays: int,
    denominator: bool,
    both: bool,
    packed: bool,
) -> Callable[[], Any]:
    def call() -> None:
        from mixers.ops.ssd.triton.backward import scan_backward
        from mixers.ops.ssd.triton.forward import Finish, Inputs, Tables, scan_forward

        sequence = torch.arange(300)[None] // 280 if packed else None
        layout = TokenLayout.from_grids(300, [[(8, (4, 8, 8))]], sequence=sequence)
        scan = layout.scan("wht")
        shape = (1, 300)
        c = torch.zeros(*shape, heads, width, dtype=dtype)
        b = torch.zeros(*shape, groups, width, dtype=dtype)
        x = torch.zeros(*shape, groups, values, dtype=dtype)
        decay = tuple(torch.zeros(*shape, decays) for _ in range(4 if both else 2))
        tables = Tables(scan.order, scan.valid, scan.sequence, scan.vision, scan.extent)
        inputs = Inputs(c, b, x, decay, tables, denominator)
        first = torch.zeros(1, decays, width, values + denominator)
        y, last, denominators = scan_forward(inputs, first)
        scan_forward(inputs, first, Finish(torch.ones(heads), torch.ones(heads, values), 1e-6))
        scan_backward(inputs, first, y, denominators, torch.zeros_like(y), last)

    return call
