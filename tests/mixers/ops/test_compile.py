"""Every kernel compiles for chips that are not there, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.mixers.ops.compile_kernels import MODULES

pytest.importorskip("triton")


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("chip", [86, 90])
def test_kernels_compile(op: str, chip: int) -> None:
    """In a process of its own: one that interprets kernels cannot compile them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.mixers.ops.compile_kernels", str(chip), op, "--sample", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= kernel["limit"], kernel
