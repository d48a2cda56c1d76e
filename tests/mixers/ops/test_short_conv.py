"""The short convolution against a loop over taps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import ROTARY_MAJOR_SCAN, ShapeError
from mixers.ops import short_conv
from tests.helpers import assert_close
from tests.mixers.oracles import naive_conv
from tests.mixers.strategies import Rows, rows


@given(rows=rows(holes=True), axes=st.sampled_from(ROTARY_MAJOR_SCAN), taps=st.integers(1, 5))
def test_equals_the_loop(rows: Rows, axes: str, taps: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*rows.shape, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    y = short_conv(x, weight, scan=rows.layout.scan(axes))
    assert_close("y", naive_conv(x, weight, rows, axes)[rows.valid], y[rows.valid], 1e-12)


@given(rows=rows(max_batch=2), taps=st.integers(2, 5), data=st.data())
def test_history_stands_before_the_first_token(rows: Rows, taps: int, data: st.DataObject) -> None:
    """Text cut in two, the first part's last inputs given as history, equals the whole."""
    length = rows.shape[1] + taps
    x, weight = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    cut = data.draw(st.integers(taps - 1, length))
    whole = short_conv(x, weight)
    tail = short_conv(x[:, cut:], weight, history=x[:, cut - taps + 1 : cut])
    assert_close("tail", whole[:, cut:], tail, 1e-12)


def test_gradients_stop_at_edges() -> None:
    tables = Rows(
        torch.ones(1, 6, dtype=torch.bool),
        torch.tensor([[0, 0, 0, 1, 1, 1]]),
        torch.full((1, 6), -1),
        torch.zeros(1, 6, 3, dtype=torch.long),
    )
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    scan = tables.layout.scan()
    assert torch.autograd.gradcheck(lambda x, w: short_conv(x, w, scan=scan), (x, weight))
    (gradient,) = torch.autograd.grad(short_conv(x, weight, scan=scan)[:, 3:].sum(), x)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].all()


@pytest.mark.parametrize(
    ("weight", "history"), [((4, 3), None), ((3, 3), (1, 3, 3)), ((3, 3), (2, 2, 3)), ((3, 3), (1, 2, 4))]
)
def test_wrong_shapes(weight: tuple[int, int], history: tuple[int, int, int] | None) -> None:
    with pytest.raises(ShapeError, match="weight must be"):
        short_conv(
            torch.zeros(1, 5, 3),
            torch.zeros(weight),
            history=None if history is None else torch.zeros(history),
        )
