"""A learned feature map: softmax of both signs of a linear map of each head."""

from __future__ import annotations

from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.dispatch import Op
from mixers.ops.feature_map import reference

WIDEST_HEAD, MOST_FEATURES = 128, 256

feature_map = Op("feature_map")


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if x.shape[-1] > WIDEST_HEAD or weight.shape[-1] > MOST_FEATURES:
        return (
            f"it takes heads of at most {WIDEST_HEAD} and features of at most {MOST_FEATURES}, found {x.shape[-1]} "
            f"and {weight.shape[-1]}"
        )
    elsewhere = triton_support.off_device(x, weight)
    if elsewhere is not None:
        return elsewhere
    width, features = (1 << (size - 1).bit_length() for size in (x.shape[-1], weight.shape[-1]))
    needed, room = 4 * (width * features + 16 * (width + features)), triton_support.shared_memory(x.device)
    if needed > room:
        return (
            f"a map from {x.shape[-1]} to {weight.shape[-1]} features may take {needed:,} bytes of shared memory, and "
            f"this chip has {room:,}"
        )
    return None


@feature_map.backend(
    "triton",
    unavailable=triton_support.unavailable,
    unsupported=_unsupported,
    hesitates=triton_support.hesitates,
)
def _triton(x: Tensor, weight: Tensor) -> Tensor:
    from mixers.ops.feature_map import triton

    return triton.feature_map(x, weight)


feature_map.backend("reference")(reference.feature_map)
