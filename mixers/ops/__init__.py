"""The operations under the mixers, each with a plain-torch reference."""

from mixers.ops.dispatch import backends, use_backend
from mixers.ops.feature_map import feature_map
from mixers.ops.finish import finish
from mixers.ops.gate import weighted_sum
from mixers.ops.join_sinks import join_sinks
from mixers.ops.short_conv import short_conv
from mixers.ops.ssd import ssd
from mixers.ops.ssd_step import ssd_step
from mixers.ops.window_attention import block_attention

__all__ = [
    "backends",
    "block_attention",
    "feature_map",
    "finish",
    "join_sinks",
    "short_conv",
    "ssd",
    "ssd_step",
    "use_backend",
    "weighted_sum",
]
