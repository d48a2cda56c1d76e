"""What FSDP2 has to know of a converted model."""

from __future__ import annotations

from torch import nn

from mixers.decay import Rates


def fp32_islands(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters stay fp32 where the rest of the model is of a narrower type.

    FSDP2 wants one type within a unit, and casts what enters one. Each island becomes a unit of its own that
    casts nothing, before the layers do::

        alone = MixedPrecisionPolicy(cast_forward_inputs=False)
        for island in bridges.fp32_islands(model):
            fully_shard(island, mp_policy=alone)
    """
    return [module for module in model.modules() if isinstance(module, Rates)]
