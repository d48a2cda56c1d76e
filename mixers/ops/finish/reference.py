"""Skip connection, norm and output gate of a scan in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.errors import ShapeError


def finish(
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    """Finish the output of a scan as Mamba2 does (arXiv 2405.21060): norm(y + skip · v) ⊙ silu(gate).

    Computed in fp32 at least, and rounded once.

    Args:
        y: [B, N, H, P].
        v: [B, N, G, P], H a multiple of G; head h adds the values of KV head h // (H/G).
        skip: [H].
        norm_weight: [H, P]: the RMS norm over P of each head is weighed by it. None: no norm.
        norm_eps: Added to the mean square.
        gate: [B, N, H, P], before its silu. None: no gate.

    Returns:
        [B, N, H, P] in y's dtype.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    check(y, v, skip, norm_weight, gate)
    wide = torch.promote_types(y.dtype, torch.float32)
    group = y.shape[2] // v.shape[2]
    out = y.to(wide) + skip.to(wide)[:, None] * v.to(wide).repeat_interleave(group, dim=2)
    if norm_weight is not None:
        out = F.rms_norm(out, out.shape[-1:], eps=norm_eps) * norm_weight.to(wide)
    if gate is not None:
        out = out * F.silu(gate.to(wide))
    return out.to(y.dtype)


def check(y: Tensor, v: Tensor, skip: Tensor, norm_weight: Tensor | None, gate: Tensor | None) -> None:
    """Raise ShapeError unless the arguments of :func:`finish` fit each other."""
    batch, length, heads, width = y.shape
    groups = v.shape[2]
    fits = v.shape == (batch, length, groups, width) and heads % groups == 0 and skip.shape == (heads,)
    fits &= norm_weight is None or norm_weight.shape == (heads, width)
    fits &= gate is None or gate.shape == y.shape
    if not fits:
        norm_shape, gate_shape = (None if t is None else list(t.shape) for t in (norm_weight, gate))
        raise ShapeError(
            f"v must be [B, N, G, P], skip [H], norm_weight [H, P] and gate [B, N, H, P] for y {list(y.shape)}; "
            f"found {list(v.shape)}, {list(skip.shape)}, {norm_shape} and {gate_shape}."
        )
