"""Reading orders: a bijection with an inverse, in the stated axis order, text left alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import ROTARY_MAJOR_SCAN, ConfigError, TokenLayout
from mixers.scan import scan_axes
from tests.mixers.oracles import reading_order
from tests.mixers.strategies import Rows, rows

AXES = ["".join(p) for p in itertools.permutations("thw")]


def test_layers_take_turns() -> None:
    assert ROTARY_MAJOR_SCAN == ("thw", "twh", "hwt", "wht")
    assert [scan_axes("rms", layer) for layer in range(6)] == ["thw", "twh", "hwt", "wht", "thw", "twh"]
    assert {scan_axes("raster", layer) for layer in range(6)} == {"thw"}
    with pytest.raises(ConfigError, match="spiral"):
        scan_axes("spiral", 0)


@given(rows=rows(holes=True), axes=st.sampled_from(AXES))
def test_order_and_inverse(rows: Rows, axes: str) -> None:
    scan, want = rows.layout.scan(axes), reading_order(rows, axes)
    steps = torch.arange(rows.shape[1]).expand(*rows.shape)
    order = steps if scan.order is None else scan.order
    inverse = steps if scan.inverse is None else scan.inverse
    assert torch.equal(order, want)
    assert torch.equal(order.sort(dim=1).values, steps)
    assert torch.equal(order.gather(1, inverse), steps)
    assert torch.equal(inverse.gather(1, order), steps)
    assert torch.equal(order[rows.clip < 0], steps[rows.clip < 0])


@given(grid=st.tuples(*[st.integers(1, 5)] * 3), axes=st.sampled_from(ROTARY_MAJOR_SCAN))
def test_a_whole_grid_is_read_last_axis_fastest(grid: tuple[int, int, int], axes: str) -> None:
    size = int(np.prod(grid))
    layout = TokenLayout.from_grids(size + 2, [[(1, grid)]])
    scan = layout.scan(axes)
    want = 1 + np.arange(size).reshape(grid).transpose(["thw".index(a) for a in axes]).ravel()
    order = torch.arange(size + 2) if scan.order is None else scan.order[0]
    assert order.tolist() == [0, *want.tolist(), size + 1]


@given(rows=rows(holes=True), axes=st.sampled_from(AXES))
def test_tables_by_slot_are_tables_by_step(rows: Rows, axes: str) -> None:
    layout = rows.layout
    scan = layout.scan(axes)
    if scan.order is None:
        return
    for by_step, by_token in ((scan.vision, layout.vision), (scan.extent, layout.extent)):
        assert torch.equal(by_step, by_token.gather(1, scan.order))
