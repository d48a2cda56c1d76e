"""What tests of every package share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_rms(ref: Tensor, out: Tensor) -> float:
    """Return rms(out - ref) / rms(ref), in fp64; 0 where both are zero."""
    ref, out = ref.detach().double(), out.detach().double()
    error, size = (out - ref).square().mean().sqrt(), ref.square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)


def assert_close(name: str, ref: Tensor, out: Tensor, ratio: float) -> None:
    """Fail unless ``out`` has ``ref``'s shape, is finite, and is within ``ratio`` of it in relative RMS."""
    assert out.shape == ref.shape, f"{name}: shape {list(out.shape)}, expected {list(ref.shape)}"
    if ref.numel() == 0:
        return
    assert torch.isfinite(ref).all(), f"{name}: the reference is not finite"
    assert torch.isfinite(out).all(), f"{name}: {int((~torch.isfinite(out)).sum())} values are not finite"
    found = relative_rms(ref, out)
    assert found <= ratio, f"{name}: relative RMS error {found:.3g} is above {ratio:.3g}"
