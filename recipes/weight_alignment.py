"""Alignment of attention weights: what the student's mixers look at, against what the teacher's attention looks at.

A scan whose output alone is compared learns slowly which tokens to tell apart; its weights say so directly
(attention weight distillation of Hedgehog, arXiv 2402.04347). They are made for some queries of a row, so that
time and memory stay O(N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import bridges
from bridges.attention import LAYOUT_KWARG
from recipes.alignment import TRACE, remove, with_input
from recipes.losses import attention_weights_loss
from recipes.plan import AttentionWeights
from recipes.recompute import recomputes
from recipes.selection import converted_attention


class WeightAlignment:
    """Hooks that compare attention weights while the student runs with a :data:`recipes.alignment.TRACE`.

    Both are given the teacher's input of the layer, whatever stream the student goes on with.

    Args:
        teacher: Not converted, frozen; it is not changed.
        student: Its converted student, whose mixers average.
        settings: How many queries.
    """

    def __init__(self, teacher: PreTrainedModel, student: nn.Module, settings: AttentionWeights) -> None:
        twins, once = bridges.attention_twins(teacher), not recomputes(student)
        self.handles: list[RemovableHandle] = [
            module.register_forward_hook(
                _Compared(index, twins[index], settings.queries, once), with_kwargs=True
            )
            for index, module in converted_attention(student).items()
        ]

    def close(self) -> None:
        """Remove the hooks."""
        remove(self.handles)


@dataclass
class _Compared:
    """Forward hook on an attention module of the student."""

    index: int
    twin: bridges.MixerAttention
    queries: int
    once: bool

    def __call__(
        self, module: bridges.MixerAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if (trace := kwargs.get(TRACE)) is None:
            return
        args, kwargs = with_input(args, kwargs, trace.inputs[self.index])
        layout = kwargs.get(LAYOUT_KWARG)
        queries, asked = trace.draw(self.queries, None if layout is None else layout.vision)
        with torch.no_grad():
            teacher = self.twin.attention_weights(queries, *args, **kwargs)
        student = module.attention_weights(queries, *args, **kwargs)
        loss = attention_weights_loss(student, teacher, asked)
        trace.note("attention_weights", self.index, loss, module if self.once else None)
