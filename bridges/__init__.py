"""Surgery on Hugging Face decoders: put token mixers where self-attention was. Knows mixers and transformers."""

from bridges.attention import MixerAttention
from bridges.cache import MixerCacheLayer, state_bytes
from bridges.errors import (
    AlreadyConvertedError,
    AssumedFamilyWarning,
    BridgeError,
    CacheError,
    CheckpointError,
    LayerPatternError,
    LayoutCaptureError,
    LayoutFallbackWarning,
    UnknownFamilyError,
    UnsupportedAttentionError,
    VersionError,
)
from bridges.families import Clips, Family, families, register_family
from bridges.new_weights import load_new_weights, save_new_weights
from bridges.plan import LayerPlan, Report, plan
from bridges.pretrained import load_pretrained
from bridges.replace import attention_layers, attention_twins, replace_attention
from bridges.sharding import fp32_islands
from bridges.transfer import Transfer

__all__ = [
    "AlreadyConvertedError",
    "AssumedFamilyWarning",
    "BridgeError",
    "CacheError",
    "CheckpointError",
    "Clips",
    "Family",
    "LayerPatternError",
    "LayerPlan",
    "LayoutCaptureError",
    "LayoutFallbackWarning",
    "MixerAttention",
    "MixerCacheLayer",
    "Report",
    "Transfer",
    "UnknownFamilyError",
    "UnsupportedAttentionError",
    "VersionError",
    "attention_layers",
    "attention_twins",
    "families",
    "fp32_islands",
    "load_new_weights",
    "load_pretrained",
    "plan",
    "register_family",
    "replace_attention",
    "save_new_weights",
    "state_bytes",
]
