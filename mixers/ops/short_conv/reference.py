"""The short convolution in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.errors import ShapeError
from mixers.layout import Scan


def short_conv(
    x: Tensor, weight: Tensor, *, scan: Scan | None = None, history: Tensor | None = None
) -> Tensor:
    """Convolve each channel over the last W steps of the scan order, within one run.

    y_s = Σ_{d < W} weight[:, W-1-d] · x_{s-d}, where steps of another run (across padding, a packed
    sequence or a clip edge) count as zero.

    Args:
        x: [B, N, C] in token order.
        weight: [C, W]; the last column weighs the step itself.
        scan: Reading order and its tables. None: one run in token order.
        history: [B, W-1, C], the steps before the first, most recent last; they belong to the run
            of step 0. None: zeros.

    Returns:
        [B, N, C] in token order, in x's dtype.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    check(x, weight, history)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    order, inverse, run = (None, None, None) if scan is None else (scan.order, scan.inverse, scan.run)
    steps = x if order is None else x.gather(1, order[..., None].expand_as(x))
    if history is None:
        history = x.new_zeros(batch, taps - 1, channels)
    steps = torch.cat([history, steps], dim=1)
    if run is not None:
        run = torch.cat([run[:, :1].expand(-1, taps - 1), run], dim=1)
    y = steps[:, taps - 1 :] * weight[:, -1]
    for back in range(1, taps):
        start = taps - 1 - back
        tap = steps[:, start : start + length] * weight[:, -1 - back]
        if run is not None:
            tap = tap * (run[:, start : start + length] == run[:, taps - 1 :])[..., None]
        y = y + tap
    y = y.to(x.dtype)
    return y if inverse is None else y.gather(1, inverse[..., None].expand_as(y))


def check(x: Tensor, weight: Tensor, history: Tensor | None) -> None:
    """Raise ShapeError unless the shapes of a short convolution fit each other."""
    batch, _, channels = x.shape
    taps = weight.shape[1]
    if weight.shape[0] != channels or (history is not None and history.shape != (batch, taps - 1, channels)):
        raise ShapeError(
            f"weight must be [C, W] and history [B, W-1, C] for x {list(x.shape)}; found {list(weight.shape)} "
            f"and {None if history is None else list(history.shape)}."
        )
