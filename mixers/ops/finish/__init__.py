"""What follows a scan: skip connection, norm of each head and output gate."""

from __future__ import annotations

from typing import Any

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
    gate: Tensor | None = None,
    **options: Any,
) -> str | None:
    return triton_support.off_device(y, v, skip, norm_weight, gate)


@finish.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.finish import triton

    return triton.finish(*args, **kwargs)


finish.backend("reference")(reference.finish)
