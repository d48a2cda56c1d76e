"""Attention sinks, joined with what queries have averaged already."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.join_sinks import reference

WIDEST, MOST = 128, 16
"""Channels of a head, and sinks of a row, that the kernels take at most."""

join_sinks = Op("join_sinks")


def _unsupported(
    q: Tensor,
    y: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> str | None:
    if k.shape[1] != 1:
        return "it takes the same sinks for all tokens of a row, and each has its own here"
    if softcap is not None:
        return "it has no soft-cap of the scores"
    if k.shape[2] > MOST or k.shape[4] > WIDEST:
        return f"it takes at most {MOST} sinks, of {WIDEST} channels, found {k.shape[2]} of {k.shape[4]}"
    return triton_support.off_device(q, y, lse, k, v)


@join_sinks.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from mixers.ops.join_sinks import triton

    return triton.join_sinks(*args, **kwargs)


join_sinks.backend("reference")(reference.join_sinks)
