"""How kernels see tensors: rows without gaps, found by the strides of the dimensions before."""

from __future__ import annotations

from torch import Tensor


def rows(t: Tensor) -> Tensor:
    """Return ``t`` with its last dimension contiguous: itself, or a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def leading(t: Tensor | None) -> tuple[int, ...]:
    """Return the strides of all dimensions but the last; zeros for a [B, N, H, P] that is not there."""
    return (0, 0, 0) if t is None else t.stride()[:-1]
