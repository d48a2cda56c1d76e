"""The softmax feature map against its formula."""

from __future__ import annotations

import pytest
import torch

from mixers import ShapeError
from mixers.ops import feature_map
from tests.helpers import assert_close


@pytest.mark.parametrize("features", [2, 4, 7])
def test_equals_the_formula(features: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(3, 4, features, dtype=torch.float64)
    found = feature_map(x, weight)
    for h in range(3):
        t = x[:, :, h] @ weight[h]
        for half, sign in ((found[:, :, h, :features], 1), (found[:, :, h, features:], -1)):
            want = torch.exp(sign * t) / torch.exp(sign * t).sum(-1, keepdim=True)
            assert_close(f"head {h}, sign {sign}", want, half, 1e-12)


@pytest.mark.parametrize("weight", [(4, 4), (2, 4, 4), (3, 8, 4)])
def test_wrong_shapes(weight: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="weight must be"):
        feature_map(torch.zeros(1, 5, 3, 4), torch.zeros(weight))
