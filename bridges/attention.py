"""The module that stands where self-attention stood."""

from __future__ import annotations

from collections.abc import Sequence
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
        sections: Frequencies of the (t, h, w) parts of a multimodal rotary embedding, for versions of
            transformers that leave putting them together to the attention.
    """

    def __init__(self, mixer: TokenMixer, layer_idx: int, sections: Sequence[int] = ()) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx
        self.sections = tuple(sections)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        linmu_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix [B, N, D] → [B, N, D]; returns (output, None).

        ``linmu_layout`` comes from the hook on the decoder. ``attention_mask`` is not read: padding
        is in the layout. A cache (``layer_past`` is GPT-NeoX's name of it) is written unless gradients
        are being recorded for training.
        """
        layout, rotary = linmu_layout, self._rotary(position_embeddings)
        cache = layer_past if past_key_values is None else past_key_values
        if cache is None or (self.training and torch.is_grad_enabled()):
            return self.mixer(hidden_states, layout, rotary), None
        layer = mixer_layer(cache, self.layer_idx)
        if not layer.is_initialized:
            with torch.inference_mode(False):  # or the state could not be updated outside of that mode
                layer.state = self.mixer.init_state(
                    len(hidden_states), hidden_states.dtype, hidden_states.device
                )
            layer.is_initialized = True
        state = state_on(layer, hidden_states.device)
        output = self.mixer(hidden_states, layout, rotary, state)
        layer.state = state
        layer.seen += hidden_states.shape[1]
        return output, None

    def attention_weights(
        self,
        queries: Tensor,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        *args: Any,
        linmu_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Tell how much of each token's value is in the outputs of ``queries``, int [B, Q]: fp32 [B, H, Q, N].

        The other arguments are those of ``forward``; see :meth:`mixers.TokenMixer.attention_weights`.
        """
        return self.mixer.attention_weights(
            hidden_states, queries, linmu_layout, self._rotary(position_embeddings)
        )

    def _rotary(self, given: Rotary | None) -> Rotary | None:
        if given is None or given[0].ndim != 4:
            return given
        cos, sin = given
        return _joined(cos, self.sections), _joined(sin, self.sections)


def rotary_sections(text_config: Any) -> tuple[int, ...]:
    """Return the sections of a text config's multimodal rotary embedding; none if it has another."""
    for name in ("rope_parameters", "rope_scaling"):
        fields = getattr(text_config, name, None)
        if isinstance(fields, dict) and "mrope_section" in fields:
            return tuple(fields["mrope_section"])
    return ()


def _joined(parts: Tensor, sections: Sequence[int]) -> Tensor:
    """Join the parts [3, B, N, R] of a multimodal rotary embedding's cos or sin to [B, N, R]."""
    pieces = parts.split([*sections, *sections], dim=-1)
    return torch.cat([piece[i % 3] for i, piece in enumerate(pieces)], dim=-1)
