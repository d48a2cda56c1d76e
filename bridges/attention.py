"""The module that stands where self-attention stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bridges.cache import mixer_layer, state_on
from mixers import Rotary, TokenLayout, TokenMixer

LAYOUT_KWARG = "linmu_layout"


class MixerAttention(nn.Module):
    """A token mixer under the call signature of Hugging Face attention.

    Args:
        mixer: The mixer.
        layer_idx: Index of the decoder layer.
    """

    def __init__(self, mixer: TokenMixer, layer_idx: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        linmu_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix [B, N, D] → [B, N, D]; returns (output, None).

        ``linmu_layout`` comes from the hook on the decoder. ``attention_mask`` is not read: padding
        is in the layout. A cache is written unless gradients are being recorded for training.
        """
        layout = linmu_layout
        if past_key_values is None or (self.training and torch.is_grad_enabled()):
            return self.mixer(hidden_states, layout, position_embeddings), None
        layer = mixer_layer(past_key_values, self.layer_idx)
        if not layer.is_initialized:
            with torch.inference_mode(False):  # or the state could not be updated outside of that mode
                layer.state = self.mixer.init_state(
                    len(hidden_states), hidden_states.dtype, hidden_states.device
                )
            layer.is_initialized = True
        state = state_on(layer, hidden_states.device)
        output = self.mixer(hidden_states, layout, position_embeddings, state)
        layer.state = state
        layer.seen += hidden_states.shape[1]
        return output, None
