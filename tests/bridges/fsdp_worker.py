"""A process of the FSDP2 test: train a converted model for some steps, print the losses as JSON.

python -m torch.distributed.run --nproc-per-node 2 -m tests.bridges.fsdp_worker bfloat16
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bridges
from tests.bridges import models


def shard(model: torch.nn.Module, dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    alone = MixedPrecisionPolicy(cast_forward_inputs=False)
    for island in bridges.fp32_islands(model):
        fully_shard(island, mesh=mesh, mp_policy=alone)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def losses(model: torch.nn.Module, steps: int = 3) -> list[float]:
    inputs = models.batch("qwen2_5_vl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(**inputs, labels=models.labels(inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dtype = getattr(torch, sys.argv[1])
    model = models.converted("qwen2_5_vl").to(dtype).train()
    shard(model, dtype)
    types: set[torch.dtype] = set()
    for island in bridges.fp32_islands(model):
        island.register_forward_hook(lambda module, _, out: types.update((module.A_log.dtype, out[0].dtype)))
    found = losses(model)
    if dist.get_rank() == 0:
        print(json.dumps({"losses": found, "types": sorted(map(str, types))}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
