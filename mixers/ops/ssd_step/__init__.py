"""One token of the SSD scan, with what follows the scan."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.ssd_step import reference

ssd_step = Op("ssd_step")


def _unsupported(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    denominator: bool = False,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> str | None:
    if state.dtype != torch.float32 or state.stride(-1) != 1:
        return f"it updates a float32 state with contiguous rows, found {state.dtype} of strides {state.stride()}"
    return triton_support.off_device(c, b, x, *decay, state, skip, norm_weight, gate)


@ssd_step.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    denominator: bool = False,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    from mixers.ops.ssd_step import triton

    return triton.ssd_step(
        c,
        b,
        x,
        decay,
        state,
        denominator=denominator,
        skip=skip,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        gate=gate,
    )


ssd_step.backend("reference")(reference.ssd_step)
