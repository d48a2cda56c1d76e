"""Work out the token layout once per forward and hand it to every converted layer.

Two pre-hooks: one on the whole model reads the token ids and grids, one on the decoder adds the layout
to the keyword arguments that reach each attention module. It travels as an argument, so it is right
under gradient checkpointing, where a context variable would show another batch's layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.attention import LAYOUT_KWARG
from bridges.errors import LayoutCaptureError
from bridges.families import Clips, Family
from mixers import TokenLayout


class LayoutCapture:
    """The hooks of one model, and what they pass to each other.

    Args:
        family: How the model's vision inputs are read.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._prompt: TokenLayout | None = None
        self._clips: Clips | None = None
        self._mask: Tensor | None = None

    def attach(self, model: nn.Module, decoder: nn.Module) -> None:
        """Register the hooks on a model and its decoder."""
        if decoder is not model:
            model.register_forward_pre_hook(self.read_inputs, with_kwargs=True)
        decoder.register_forward_pre_hook(self.add_layout, with_kwargs=True)

    @contextlib.contextmanager
    def prompt(self, config: Any, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Remember where vision stands in a prompt while ``generate`` feeds it to forward.

        ``generate`` encodes images before prefill and keeps their grids from forward, so they are
        read here.
        """
        before = self._prompt
        if isinstance(input_ids, Tensor) and input_ids.ndim == 2 and input_ids.shape[1]:
            clips = self.family.clips(config, input_ids, inputs)
            if clips is not None:
                self._prompt = TokenLayout(*input_ids.shape, clip=clips.clip, coords=clips.coords)
        try:
            yield
        finally:
            self._prompt = before

    def read_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._mask = kwargs.get("attention_mask")
        self._clips = None
        if self._prompt is None and isinstance(input_ids, Tensor) and input_ids.shape[1] > 1:
            self._clips = self.family.clips(model.config, input_ids, kwargs)

    def add_layout(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder."""
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        mask, clips, self._mask, self._clips = self._mask, self._clips, None, None
        if mask is None:
            mask = kwargs.get("attention_mask")
        if tokens is not None and kwargs.get(LAYOUT_KWARG) is None:
            past = kwargs.get("past_key_values")
            seen = 0 if past is None else int(past.get_seq_length())
            batch, length = tokens.shape[:2]
            kwargs[LAYOUT_KWARG] = self._layout(batch, length, seen, tokens.device, mask, clips, kwargs)
        return args, kwargs

    def _layout(
        self,
        batch: int,
        length: int,
        seen: int,
        device: torch.device,
        mask: Any,
        clips: Clips | None,
        kwargs: Mapping[str, Any],
    ) -> TokenLayout:
        clip, coords = (None, None) if clips is None else (clips.clip, clips.coords)
        if self._prompt is not None and seen < self._prompt.length:
            clip, coords = self._prompt_part(batch, slice(seen, seen + length), device)
        valid = sequence = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = torch.ones(batch, length, dtype=torch.bool, device=device)
            given = mask[:, seen : seen + length].to(device) != 0
            valid[:, : given.shape[1]] = given
        if length > 1 and valid is None:
            sequence = _packed_sequences(batch, length, device, kwargs)
        return TokenLayout(
            batch, length, valid=valid, sequence=sequence, clip=clip, coords=coords, device=device
        )

    def _prompt_part(
        self, batch: int, tokens: slice, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Clips of a span of the prompt, in all beams, and text where the span goes past its end."""
        assert self._prompt is not None
        if batch % self._prompt.batch_size:
            raise LayoutCaptureError(
                f"forward got {batch} rows, which is no multiple of the prompt's {self._prompt.batch_size}."
            )
        rows = torch.arange(self._prompt.batch_size).repeat_interleave(batch // self._prompt.batch_size)
        part = self._prompt.to(device).select(rows, tokens)
        if part.clip is None or part.coords is None:
            return None, None
        beyond = tokens.stop - tokens.start - part.length
        return F.pad(part.clip, (0, beyond), value=-1), F.pad(part.coords, (0, 0, 0, beyond))


def _packed_sequences(
    batch: int, length: int, device: torch.device, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Number the sequences of packed rows, as the kwargs of Hugging Face's collators tell them.

    Returns:
        int [B, N], or None where each row is one sequence.
    """
    if (numbers := kwargs.get("seq_idx")) is not None:
        return numbers.view(batch, length)
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        return TokenLayout.packed(bounds).sequence
    positions = kwargs.get("position_ids")
    if positions is None or (positions.ndim == 3 and len(positions) != 4):
        return None
    positions = positions[0] if positions.ndim == 3 else positions
    restarts = positions.to(device).diff(dim=1, prepend=positions[:, :1].to(device) - 1) != 1
    return restarts.cumsum(1).expand(batch, -1) if bool(restarts.any()) else None
