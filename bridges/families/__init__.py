"""One small descriptor a model family."""

from bridges.families import llama, qwen2, qwen2_5_vl
from bridges.families.family import Clips, Family, families, family_of, register_family

__all__ = ["Clips", "Family", "families", "family_of", "llama", "qwen2", "qwen2_5_vl", "register_family"]
