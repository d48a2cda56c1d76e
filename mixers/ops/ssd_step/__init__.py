"""One token of the SSD scan, with what follows the scan."""

from __future__ import annotations

from typing import Any

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
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    **options: Any,
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
def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.ssd_step import triton

    return triton.ssd_step(*args, **kwargs)


ssd_step.backend("reference")(reference.ssd_step)
