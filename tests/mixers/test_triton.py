"""On interpreted kernels a whole mixer gives what it gives on plain torch: at once, and prefilled then decoded."""

from __future__ import annotations

import pytest
import torch

from mixers import TokenLayout, use_backend
from mixers.ops import triton_support
from tests.helpers import assert_close
from tests.mixers.zoo import TINY, random_rotary, tiny

LENGTH, START = 42, 39

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None or not triton_support.interpreting(),
    reason="kernels are interpreted where there is no GPU; test_gpu runs them on one",
)


@pytest.mark.parametrize("variant", ["mamba2-head-decay", "mmate"])
def test_prefill_and_decoding(variant: str) -> None:
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :5] = False
    layout = TokenLayout.from_grids(LENGTH, [[(3, (2, 3, 4))], [(12, (2, 2, 5))]], valid=valid)
    rotary, mixer = random_rotary(2, LENGTH), tiny(variant)
    x = torch.randn(2, LENGTH, TINY["dim"])
    with torch.no_grad():
        expected = mixer(x, layout, rotary)
        with use_backend("triton"):
            whole = mixer(x, layout, rotary)
            state = mixer.init_state(2)
            first = layout.select(tokens=slice(0, START))
            parts = [mixer(x[:, :START], first, tuple(t[:, :START] for t in rotary), state)]
            for i in range(START, LENGTH):
                parts.append(mixer(x[:, i : i + 1], None, tuple(t[:, i : i + 1] for t in rotary), state))
    assert_close("at once", expected[valid], whole[valid], 1e-5)
    assert_close("in parts", expected[valid], torch.cat(parts, dim=1)[valid], 1e-5)
