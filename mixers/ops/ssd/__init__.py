"""State space duality: the masked scan in one or both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.ssd import reference

WIDEST_STATE, WIDEST_HEAD = 512, 128

ssd = Op("ssd")


def _unsupported(
    c: Tensor, b: Tensor, x: Tensor, *args: Any, maps: tuple[Tensor, Tensor] | None = None, **kwargs: Any
) -> str | None:
    width = c.shape[-1] if maps is None else 2 * maps[0].shape[-1]
    if width > WIDEST_STATE or x.shape[-1] > WIDEST_HEAD:
        return (
            f"its states are at most {WIDEST_STATE} by {WIDEST_HEAD} (K by P), found {width} by {x.shape[-1]}"
        )
    return triton_support.off_device(c, b, x)


@ssd.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from mixers.ops.ssd import triton

    return triton.ssd(*args, **kwargs)


ssd.backend("reference")(reference.ssd)
