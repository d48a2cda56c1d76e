"""DeepSpeed's ZeRO over two processes: the losses of one process. Runs where deepspeed is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.bridges import models
from tests.bridges.fsdp_worker import losses
from tests.bridges.test_fsdp import free_port


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_as_whole(stage: int, dtype: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    worker = ["-m", "tests.bridges.deepspeed_worker", str(stage), dtype]
    done = subprocess.run(
        [*launcher, "--master-port", str(free_port()), *worker],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    whole = losses(models.converted("qwen2_5_vl").train())
    assert found["losses"] == pytest.approx(whole, rel=1e-4 if dtype == "float32" else 1e-1)
