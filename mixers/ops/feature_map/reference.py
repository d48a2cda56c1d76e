"""The softmax feature map in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.errors import ShapeError
from mixers.precision import without_autocast


def feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """Return [softmax(t), softmax(-t)] with t = x · weight of each head (Hedgehog, arXiv 2402.04347).

    Computed in fp32 at least, and rounded once.

    Args:
        x: [B, N, H, P].
        weight: [H, P, R].

    Returns:
        [B, N, H, 2R] in x's dtype; each half sums to 1.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    check(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        t = torch.einsum("bnhp,hpr->bnhr", x.to(wide), weight.to(wide))
    return torch.cat([t.softmax(-1), (-t).softmax(-1)], dim=-1).to(x.dtype)


def check(x: Tensor, weight: Tensor) -> None:
    """Raise ShapeError unless the arguments of :func:`feature_map` fit each other."""
    if weight.ndim != 3 or weight.shape[:2] != x.shape[2:]:
        raise ShapeError(
            f"weight must be [H, P, R] with [H, P] = {list(x.shape[2:])} for x {list(x.shape)}, found "
            f"{list(weight.shape)}."
        )
