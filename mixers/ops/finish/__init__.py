"""What follows a scan: skip connection, norm of each head and output gate."""

from __future__ import annotations

from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.finish import reference

finish = Op("finish")


def _unsupported(
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> str | None:
    return triton_support.off_device(y, v, skip, norm_weight, gate)


@finish.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    from mixers.ops.finish import triton

    return triton.finish(y, v, skip, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate)


finish.backend("reference")(reference.finish)
