"""The weighted sum of branches in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixers.errors import ShapeError


def weighted_sum(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return Σ_b weights_b ⊙ ys_b, computed in fp32 at least and rounded once.

    Args:
        ys: Outputs of one branch or more, each [B, N, H, P].
        weights: As many, each [B, N, H, 1], or [B, N, 1, 1] for one weight a token.

    Returns:
        [B, N, H, P] in the first branch's dtype.

    Raises:
        ShapeError: The shapes or the numbers of tensors do not fit each other.
    """
    check(ys, weights)
    wide = torch.promote_types(ys[0].dtype, torch.float32)
    total = weights[0].to(wide) * ys[0].to(wide)
    for weight, y in zip(weights[1:], ys[1:]):
        total = total + weight.to(wide) * y.to(wide)
    return total.to(ys[0].dtype)


def check(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise ShapeError unless the arguments of :func:`weighted_sum` fit each other."""
    shape = ys[0].shape if ys else torch.Size()
    fits = len(shape) == 4 and len(ys) == len(weights) and all(y.shape == shape for y in ys)
    allowed = [(*shape[:2], heads, 1) for heads in (1, shape[2])] if fits else []
    if not fits or any(w.shape not in allowed for w in weights):
        raise ShapeError(
            "there must be as many weights [B, N, H or 1, 1] as branches [B, N, H, P]; found "
            f"{[list(w.shape) for w in weights]} and {[list(y.shape) for y in ys]}."
        )
