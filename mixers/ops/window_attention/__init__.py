"""Softmax attention inside small groups of tokens: 3-D windows and the causal text window."""

from mixers.ops.dispatch import Op
from mixers.ops.window_attention import reference

block_attention = Op("block_attention")
block_attention.backend("reference")(reference.block_attention)
