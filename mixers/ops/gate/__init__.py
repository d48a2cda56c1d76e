"""The weighted sum of several branches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.gate import reference

weighted_sum = Op("weighted_sum")


def _unsupported(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    if len(ys) != 2:
        return f"it sums two branches, found {len(ys)}"
    return triton_support.off_device(*ys, *weights)


@weighted_sum.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    from mixers.ops.gate import triton

    return triton.weighted_sum(ys, weights)


weighted_sum.backend("reference")(reference.weighted_sum)
