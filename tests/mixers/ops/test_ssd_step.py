"""The one-token step: what it adds to the scan's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixers import ShapeError
from mixers.ops import finish, ssd_step
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    batch: int,
    heads: tuple[int, int],
    per_head: bool,
    sizes: tuple[int, int],
    denominator: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of a step with skip, norm and gate; c, b and x are slices of wider tensors."""
    torch.manual_seed(0)
    (h, g), (k, p) = heads, sizes
    e = h if per_head else g

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape[:-1], shape[-1] + 8, device=DEVICE).to(dtype)[..., 8:]

    return {
        "c": uniform(batch, h, k),
        "b": uniform(batch, g, k),
        "x": uniform(batch, g, p) - 0.5,
        "decay": (-torch.rand(batch, e, device=DEVICE), torch.rand(batch, e, device=DEVICE)),
        "state": torch.rand(batch, e, k, p + denominator, device=DEVICE),
        "denominator": denominator,
        "skip": torch.randn(h, device=DEVICE),
        "norm_weight": torch.randn(h, p, device=DEVICE),
        "gate": uniform(batch, h, p) * 4 - 2,
    }


def exactly(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments in fp64."""
    wide = {k: t.double() if torch.is_tensor(t) else t for k, t in arguments.items()}
    return {**wide, "decay": tuple(t.double() for t in arguments["decay"])}


def test_finishes_the_plain_step() -> None:
    given = exactly(draw(3, (6, 2), False, (8, 4), True))
    plain = {key: given[key] for key in ("c", "b", "x", "decay", "denominator")}
    y = ssd_step(**plain, state=given["state"].clone())
    tail = {key: given[key] for key in ("norm_weight", "gate")}
    want = finish(
        y[:, None], given["x"][:, None], given["skip"], norm_weight=tail["norm_weight"],
        gate=tail["gate"][:, None],
    )[:, 0]  # fmt: skip
    assert_close("y", want, ssd_step(**given), 1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"b": (2, 2, 5)},
        {"x": (2, 1, 4)},
        {"state": (2, 2, 8, 5)},
        {"state": (2, 6, 8, 4)},
        {"skip": (2,)},
        {"gate": (2, 24)},
        {"norm_weight": (6, 8)},
        {"c": (2, 5, 8)},
    ],
)
def test_wrong_shapes(change: dict[str, tuple[int, ...]]) -> None:
    given = draw(2, (6, 2), False, (8, 4), False)
    for name, shape in change.items():
        given[name] = torch.zeros(shape, device=DEVICE)
    before = given["state"].clone()
    with pytest.raises(ShapeError):
        ssd_step(**given)
    assert torch.equal(given["state"], before)
