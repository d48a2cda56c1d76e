"""The weighted sum of branches, in plain torch."""

from __future__ import annotations

import pytest
import torch

from mixers import ShapeError
from mixers.ops import weighted_sum
from tests.helpers import assert_close


def test_three_branches() -> None:
    torch.manual_seed(0)
    ys = [torch.randn(2, 5, 4, 8, dtype=torch.float64) for _ in range(3)]
    weights = [torch.rand(2, 5, heads, 1, dtype=torch.float64) for heads in (4, 1, 4)]
    want = sum(y * w.expand(2, 5, 4, 8) for y, w in zip(ys, weights))
    assert_close("y", want, weighted_sum(ys, weights), 1e-12)


@pytest.mark.parametrize(
    ("ys", "weights"),
    [
        ([], []),
        ([(1, 5, 4, 8)] * 2, [(1, 5, 1, 1)]),
        ([(1, 5, 4, 8), (1, 5, 4, 4)], [(1, 5, 1, 1)] * 2),
        ([(1, 5, 4, 8)] * 2, [(1, 5, 1, 1), (1, 5, 2, 1)]),
        ([(1, 5, 4, 8)] * 2, [(1, 5, 4)] * 2),
    ],
)
def test_wrong_shapes(ys: list[tuple[int, ...]], weights: list[tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match="as many weights"):
        weighted_sum([torch.zeros(s) for s in ys], [torch.zeros(s) for s in weights])
