"""FSDP2 over two processes: the losses of one process, and decays in fp32 beside bf16."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.bridges import models
from tests.bridges.fsdp_worker import losses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_as_whole(dtype: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--master-port", str(free_port()), "-m", "tests.bridges.fsdp_worker", dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["types"] == ["torch.float32"]
    whole = losses(models.converted("qwen2_5_vl").train())
    assert found["losses"] == pytest.approx(whole, rel=1e-4 if dtype == "float32" else 5e-2)
