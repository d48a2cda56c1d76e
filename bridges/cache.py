"""The cache layer that holds a mixer's state inside Hugging Face's ``Cache``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from bridges.errors import CacheError
from mixers import MixerState


class MixerCacheLayer(CacheLayerMixin):
    """A mixer's state, batch first, under the interface that ``generate()`` expects of a layer.

    Its size does not grow with the tokens read, unless the mixer is ``attention``.

    Attributes:
        state: The mixer's state; empty before the first call.
        seen: Tokens read, padding included.
        slots: Keys that the layers beside it hold room for, in a cache of fixed size; -1 where it grows.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = True

    def __init__(self, slots: int = -1) -> None:
        super().__init__()
        self.state: MixerState = {}
        self.seen = 0
        self.slots = slots

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the mixer makes its state on its first call."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Refuse keys and values: the mixer writes its own state."""
        if args and args[0] is None:
            return None, None
        raise CacheError(
            "this cache layer holds a mixer's state, but an attention layer wrote keys and values to it."
        )

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (keys, offset) of the layers beside it, for whose masks this layer may be asked."""
        if self.slots >= 0:
            return self.slots, 0
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + length, 0

    def get_seq_length(self, *args: Any) -> int:
        """Return the tokens read."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = {}, 0, False

    def offload(self) -> None:
        """Move the state to the CPU; the mixer brings it back where it runs."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Do nothing: the mixer brings the state back where it runs."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` [B], in that order."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, max_length: int) -> None:
        """Refuse: what a recurrent state has read cannot be taken out of it."""
        if max_length in (0, self.seen):
            return
        raise CacheError(
            f"a recurrent state of {self.seen} tokens cannot be cropped to {max_length}; keep a copy of the "
            "cache from before, or prefill again."
        )

    def activate_past_recording(self) -> None:
        """Refuse: assisted decoding needs to roll the state back."""
        raise CacheError("assisted decoding rolls the cache back, which a recurrent state does not allow.")

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):  # or the state could not be updated outside of that mode
            self.state = {name: fn(t) for name, t in self.state.items()}


def mixer_layer(cache: Cache, layer_idx: int) -> MixerCacheLayer:
    """Return the mixer's layer of a cache, putting one there on the first call.

    Raises:
        CacheError: The place holds keys and values of an attention layer.
    """
    layers = cache.layers
    while len(layers) <= layer_idx:
        layers.append(MixerCacheLayer())
    layer = layers[layer_idx]
    if not isinstance(layer, MixerCacheLayer):
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
            raise CacheError(
                f"cache layer {layer_idx} already holds keys and values of another model; start from an empty cache."
            )
        static = [one for one in layers if isinstance(one, StaticLayer) and not one.is_sliding]
        layer = layers[layer_idx] = MixerCacheLayer(max([-1, *(one.max_cache_len for one in static)]))
    return layer


def state_bytes(cache: Cache) -> int:
    """Return the bytes of all mixer states in a cache."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, MixerCacheLayer))


def state_on(layer: MixerCacheLayer, device: torch.device) -> MixerState:
    """Return the layer's state on a device, moving it there if it is elsewhere."""
    if any(t.device != device for t in layer.state.values()):
        layer.state = {name: t.to(device) for name, t in layer.state.items()}
    return layer.state
