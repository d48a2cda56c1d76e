"""Rotary position embedding, as the teacher applied it."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of P channels of each head (rotate-half convention; R = P is the full form).

    Args:
        x: [B, N, H, P].
        cos: [B, N, R].
        sin: [B, N, R].

    Returns:
        [B, N, H, P], of ``x``'s dtype.
    """
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    low, high = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
