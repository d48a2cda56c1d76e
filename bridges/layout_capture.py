"""Work out the token layout once per forward and hand it to every converted layer.

A pre-hook on the model that holds the decoder reads the token ids and grids, one on the decoder adds the
layout to the keyword arguments that reach each attention module. It travels as an argument, so
it is right under gradient checkpointing, where a context variable would show another batch's layout.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bridges.attention import LAYOUT_KWARG, MixerAttention
from bridges.errors import LayoutCaptureError
from bridges.families import Clips, Family
from mixers import TokenLayout


@dataclass(frozen=True)
class _Prompt:
    """What ``generate`` was asked to continue: ids [B, N] (or embeddings) after ``offset`` cached tokens."""

    ids: Tensor | None
    layout: TokenLayout
    offset: int

    def begins(self, input_ids: Any, start: int, beams: int) -> bool:
        """Whether ids fed to forward are the prompt's from token ``start`` on, in each of its beams."""
        if self.ids is None or not isinstance(input_ids, Tensor):
            return not isinstance(input_ids, Tensor)
        own = self.ids[:, start : start + input_ids.shape[1]].repeat_interleave(beams, dim=0)
        return bool((input_ids[:, : own.shape[1]] == own.to(input_ids.device)).all())

    def part(self, start: int, length: int, beams: int, device: torch.device) -> Clips | None:
        """Clips of a span, in all beams, and text where the span goes past the prompt's end."""
        rows = torch.arange(self.layout.batch_size).repeat_interleave(beams)
        part = self.layout.to(device).select(rows, slice(start, start + length))
        if part.clip is None or part.coords is None:
            return None
        beyond = length - part.length
        return Clips(F.pad(part.clip, (0, beyond), value=-1), F.pad(part.coords, (0, 0, 0, beyond)))


class LayoutCapture:
    """The hooks of one model, and what they pass to each other within a thread.

    Args:
        family: How the model's vision inputs are read.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._prompts: dict[int, _Prompt | None] = {}
        self._read: dict[int, tuple[Any, Clips | None]] = {}
        self._foretold: dict[int, tuple[Tensor, Clips | None]] = {}

    def attach(self, model: nn.Module, decoder: nn.Module) -> None:
        """Register the hooks on the decoder of a model and on the innermost model around it."""
        around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not decoder]
        around = [m for m in around if any(part is decoder for part in m.modules())]
        if around:
            around[-1].register_forward_pre_hook(self.read_inputs, with_kwargs=True)
            around[-1].register_forward_hook(self.forget_inputs, always_call=True)
        decoder.register_forward_pre_hook(self.add_layout, with_kwargs=True)

    def foretell(self, embeddings: Tensor, clips: Clips | None) -> None:
        """Say where vision stands in embeddings [B, N, D] that the next forward or ``generate`` gets as they are.

        For models that put vision between the tokens before their decoder, which then sees no ids.
        """
        self._foretold[threading.get_ident()] = embeddings, clips

    @contextlib.contextmanager
    def prompt(self, config: Any, input_ids: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Remember where vision stands in a prompt while ``generate`` feeds it to forward.

        ``generate`` encodes images before prefill and keeps their grids from forward, so they are
        read here.
        """
        thread = threading.get_ident()
        before = self._prompts.get(thread)
        self._prompts[thread] = self._read_prompt(config, input_ids, inputs)
        try:
            yield
        finally:
            self._prompts[thread] = before

    def _read_prompt(self, config: Any, input_ids: Any, inputs: Mapping[str, Any]) -> _Prompt | None:
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.shape[1]:
            embeddings: Any = inputs.get("inputs_embeds")
            clips = self._find_without_ids(config, embeddings, inputs)
            return None if clips is None else _Prompt(None, _layout(embeddings, clips), 0)
        mask, seen, offset = inputs.get("attention_mask"), _seen(inputs), 0
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            offset = seen  # transformers' sign that the ids of cached tokens are left out
        try:
            clips = self.family.clips(config, input_ids, inputs)
        except LayoutCaptureError:
            if not offset < seen < input_ids.shape[1]:
                raise
            input_ids, offset = input_ids[:, seen:], seen  # grids of cached clips may be left out too
            clips = self.family.clips(config, input_ids, inputs)
        return _Prompt(input_ids, _layout(input_ids, clips), offset)

    @torch.compiler.disable
    def read_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model around the decoder."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None:
            _check_mask(mask)
        clips = None
        if kwargs.get(LAYOUT_KWARG) is None:
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            clips = self._find_clips(model.config, input_ids, kwargs)
        self._read[threading.get_ident()] = mask, clips

    @torch.compiler.disable
    def forget_inputs(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the same model, run after an error too, which may have kept them from the decoder."""
        self._read.pop(threading.get_ident(), None)

    @torch.compiler.disable
    def add_layout(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder."""
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        mask, clips = kwargs.get("attention_mask"), None
        if (read := self._read.pop(threading.get_ident(), None)) is not None:
            mask, clips = read  # of which the model around may have made a mask of pairs
        if tokens is not None and kwargs.get(LAYOUT_KWARG) is None:
            valid = _valid(tokens, mask, _seen(kwargs))
            sequence = _packed_sequences(tokens, valid is not None, kwargs)
            kwargs[LAYOUT_KWARG] = _layout(tokens, clips, valid, sequence)
            _prepare(decoder, kwargs)
        return args, kwargs

    def _find_clips(self, config: Any, input_ids: Any, kwargs: Mapping[str, Any]) -> Clips | None:
        """Find the vision tokens of a forward, whose grids only ``generate`` may know."""
        tokens = input_ids if isinstance(input_ids, Tensor) else kwargs.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return None
        prompt = self._prompts.get(threading.get_ident())
        if prompt is not None:
            start = _seen(kwargs) - prompt.offset
            if prompt.layout.clip is None or start >= prompt.layout.length:
                return None  # what is generated is text, even where it is a token that stands for vision
            rows, rest = divmod(len(tokens), prompt.layout.batch_size)
            if start >= 0 and rest == 0 and prompt.begins(input_ids, start, rows):
                return prompt.part(start, tokens.shape[1], rows, tokens.device)
        if not isinstance(input_ids, Tensor):
            return self._find_without_ids(config, tokens, kwargs)
        return self.family.clips(config, input_ids, kwargs) if tokens.shape[1] > 1 else None

    def _find_without_ids(self, config: Any, embeddings: Any, kwargs: Mapping[str, Any]) -> Clips | None:
        told_of, clips = self._foretold.pop(threading.get_ident(), (None, None))
        if told_of is not None and told_of is not embeddings:
            raise LayoutCaptureError(
                f"vision was found in embeddings of shape {list(told_of.shape)}, but others reached the decoder, so "
                "where it stands in them is not known; pass them on as they are (VILA: packing=False)."
            )
        if told_of is not None or (isinstance(embeddings, Tensor) and embeddings.shape[1] == 1):
            return clips
        return self.family.clips(config, None, kwargs)


def _prepare(decoder: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Make the tables of a layout once for all layers, before ``torch.compile`` could trace how."""
    config: Any = decoder.config
    layout, use_cache = kwargs[LAYOUT_KWARG], kwargs.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    cached = bool(use_cache or kwargs.get("past_key_values") is not None)
    cached = cached and not (decoder.training and torch.is_grad_enabled())
    for part in decoder.modules() if layout.length > 1 else ():
        if isinstance(part, MixerAttention):
            part.mixer.prepare(layout, cached=cached)


def _layout(
    tokens: Tensor, clips: Clips | None, valid: Tensor | None = None, sequence: Tensor | None = None
) -> TokenLayout:
    batch, length = tokens.shape[:2]
    clip, coords = (None, None) if clips is None else (clips.clip, clips.coords)
    return TokenLayout(
        batch, length, valid=valid, sequence=sequence, clip=clip, coords=coords, device=tokens.device
    )


def _valid(tokens: Tensor, mask: Any, seen: int) -> Tensor | None:
    """Return which of these tokens are no padding, by a mask of them and the tokens before; None: all."""
    if not isinstance(mask, Tensor):
        return None
    _check_mask(mask)
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    given = mask[:, seen : seen + tokens.shape[1]].to(tokens.device) != 0
    valid[:, : given.shape[1]] = given
    return valid


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise LayoutCaptureError(
            f"attention_mask must be [B, N], found {found}: mixers follow padding and packing (position_ids, "
            "seq_idx or cu_seq_lens_q), no mask of pairs."
        )


def _packed_sequences(tokens: Tensor, masked: bool, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Number the sequences of packed rows, as the kwargs of Hugging Face's collators tell them.

    Beside a mask, ``position_ids`` that start again say nothing, as in transformers: they do at padding.

    Returns:
        int [B, N], or None where each row is one sequence.
    """
    batch, length = tokens.shape[:2]
    if length == 1:
        return None
    if (numbers := kwargs.get("seq_idx")) is not None:
        return numbers.view(batch, length)
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        return TokenLayout.packed(bounds).sequence
    positions = kwargs.get("position_ids")
    if masked or positions is None or (positions.ndim == 3 and len(positions) != 4):
        return None
    positions = (positions[0] if positions.ndim == 3 else positions).to(tokens.device)
    restarts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    return restarts.cumsum(1).expand(batch, -1) if bool(restarts.any()) else None


def _seen(kwargs: Mapping[str, Any]) -> int:
    """Return the tokens that the cache holds already."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
