"""Short causal depthwise convolution that respects edges."""

from __future__ import annotations

from torch import Tensor

from mixers.layout import Scan
from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.short_conv import reference

short_conv = Op("short_conv")


def _unsupported(
    x: Tensor, weight: Tensor, *, scan: Scan | None = None, history: Tensor | None = None
) -> str | None:
    return triton_support.off_device(x, weight, history)


@short_conv.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(x: Tensor, weight: Tensor, *, scan: Scan | None = None, history: Tensor | None = None) -> Tensor:
    from mixers.ops.short_conv import triton

    return triton.short_conv(x, weight, scan=scan, history=history)


short_conv.backend("reference")(reference.short_conv)
