"""What follows a scan, against its formula."""

from __future__ import annotations

import pytest
import torch

from mixers import ShapeError
from mixers.ops import finish
from tests.helpers import assert_close


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_formula(norm: bool, gated: bool) -> None:
    torch.manual_seed(0)
    y, gate = (torch.randn(2, 5, 6, 4, dtype=torch.float64) for _ in range(2))
    v, skip = torch.randn(2, 5, 2, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = torch.randn(6, 4, dtype=torch.float64)
    found = finish(
        y, v, skip, norm_weight=weight if norm else None, norm_eps=0.1, gate=gate if gated else None
    )
    for h in range(6):
        want = y[:, :, h] + skip[h] * v[:, :, h // 3]
        if norm:
            want = want / (want.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight[h]
        if gated:
            want = want * gate[:, :, h] / (1 + torch.exp(-gate[:, :, h]))
        assert_close(f"head {h}", want, found[:, :, h], 1e-12)


def test_narrow_types_are_rounded_once() -> None:
    torch.manual_seed(0)
    y, v, gate = (torch.randn(1, 9, 4, 16).bfloat16() for _ in range(3))
    skip, weight = torch.randn(4), torch.randn(4, 16)
    found = finish(y, v, skip, norm_weight=weight, gate=gate)
    exact = finish(y.float(), v.float(), skip, norm_weight=weight, gate=gate.float())
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize(
    "change",
    [
        {"v": (1, 5, 3, 8)},
        {"v": (1, 4, 2, 8)},
        {"skip": (2,)},
        {"norm_weight": (4,)},
        {"norm_weight": (2, 8)},
        {"gate": (1, 5, 32)},
    ],
)
def test_wrong_shapes(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"y": (1, 5, 4, 8), "v": (1, 5, 2, 8), "skip": (4,), "norm_weight": (4, 8), "gate": (1, 5, 4, 8)}
    t = {key: torch.zeros(shape) for key, shape in {**shapes, **change}.items()}
    with pytest.raises(ShapeError, match="v must be"):
        finish(t["y"], t["v"], t["skip"], norm_weight=t["norm_weight"], gate=t["gate"])
