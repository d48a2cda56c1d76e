"""65,536 tokens on a CPU: extra memory below 2 GiB, forward and with gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import torch
from mixers import TokenLayout
from mixers.ops import ssd

torch.set_num_threads(1)
learn = sys.argv[1] == "backward"
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
length, heads, groups, width = 65536, 8, 2, 64
ssd(*(torch.randn(1, 64, h, width) for h in (heads, groups, groups)), (torch.rand(1, 64, groups),) * 2)
before = peak()
scan = TokenLayout.from_grids(length, [[(10, (16, 64, 63))]]).scan("hwt")
c, b, x = (torch.randn(1, length, h, width, requires_grad=learn) for h in (heads, groups, groups))
decays = [(-torch.rand(1, length, groups), torch.rand(1, length, groups)) for _ in range(2)]
y, _ = ssd(c, b, x, *decays, scan=scan)
if learn:
    y.mean().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_extra_memory(mode: str) -> None:
    """One giant clip in both directions, inputs and outputs counted."""
    result = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 2.0
