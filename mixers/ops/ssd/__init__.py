"""State space duality: the masked scan in one or both directions, and its one-token step."""

from mixers.ops.dispatch import Op
from mixers.ops.ssd import reference

ssd = Op("ssd")
ssd.backend("reference")(reference.ssd)

ssd_step = Op("ssd_step")
ssd_step.backend("reference")(reference.ssd_step)
