"""Short causal depthwise convolution that respects edges."""

from mixers.ops.dispatch import Op
from mixers.ops.short_conv import reference

short_conv = Op("short_conv")
short_conv.backend("reference")(reference.short_conv)
