"""Surgery on Hugging Face decoders: put token mixers where self-attention was. Knows mixers and transformers."""

from bridges.attention import MixerAttention
from bridges.cache import MixerCacheLayer, state_bytes
from bridges.errors import (
    AlreadyConvertedError,
    BridgeError,
    CacheError,
    CheckpointError,
    LayerPatternError,
    LayoutCaptureError,
    UnknownFamilyError,
    UnsupportedAttentionError,
)
from bridges.families import Clips, Family, families, register_family
from bridges.plan import LayerPlan, Report, plan
from bridges.pretrained import load_pretrained
from bridges.replace import attention_layers, replace_attention
from bridges.transfer import Transfer

__all__ = [
    "AlreadyConvertedError",
    "BridgeError",
    "CacheError",
    "CheckpointError",
    "Clips",
    "Family",
    "LayerPatternError",
    "LayerPlan",
    "LayoutCaptureError",
    "MixerAttention",
    "MixerCacheLayer",
    "Report",
    "Transfer",
    "UnknownFamilyError",
    "UnsupportedAttentionError",
    "attention_layers",
    "families",
    "load_pretrained",
    "plan",
    "register_family",
    "replace_attention",
    "state_bytes",
]
