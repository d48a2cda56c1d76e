"""The operations under the mixers, each with a plain-torch reference."""

from mixers.ops.dispatch import backends, use_backend
from mixers.ops.short_conv import short_conv
from mixers.ops.ssd import ssd, ssd_step
from mixers.ops.window_attention import block_attention

__all__ = ["backends", "block_attention", "short_conv", "ssd", "ssd_step", "use_backend"]
