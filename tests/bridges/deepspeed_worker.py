"""A process of the DeepSpeed test: train a converted model for some steps, print the losses as JSON.

python -m torch.distributed.run --nproc-per-node 2 -m tests.bridges.deepspeed_worker 3 bfloat16
"""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
import torch.distributed as dist

from tests.bridges import models


def main() -> None:
    torch.set_num_threads(1)
    stage, dtype = int(sys.argv[1]), sys.argv[2]
    deepspeed.init_distributed(dist_backend="gloo")
    model = models.converted("qwen2_5_vl").train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    inputs = models.batch("qwen2_5_vl")
    found = []
    for _ in range(3):
        loss = engine(**inputs, labels=models.labels(inputs)).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    if dist.get_rank() == 0:
        print(json.dumps({"losses": found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
