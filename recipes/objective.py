"""What a stage minimises: its named losses, weighed, measured while the student's forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recipes.alignment import TRACE, Alignment, TeacherTrace, Trace
from recipes.data.task import Batch, unmasked
from recipes.losses import (
    OutputHead,
    check_head,
    cross_entropy,
    predicted_tokens,
    token_kd,
    valid_tokens,
)
from recipes.plan import Losses, TokenKD
from recipes.selection import converted_attention
from recipes.shared_vision import SharedVision
from recipes.weight_alignment import WeightAlignment

FROM_TEACHER = "from_teacher"
"""Key of a batch: bool [B], the rows whose answer the teacher generated."""

MICRO_BATCHES = "micro_batches"
"""Key of the counts: forward passes of the optimiser step."""

Counts = Mapping[str, Tensor | int]
"""Loss name → tokens it is the mean over, in all forward passes of an optimiser step."""


def token_masks(losses: Losses, batch: Batch) -> dict[str, Tensor]:
    """Return loss name → bool [B, N], the positions whose next token the loss is about."""
    masks = {}
    if losses.token_kd is not None:
        masks["token_kd"] = predicted_tokens(batch, losses.token_kd.tokens)
    if losses.task is not None or losses.sequence_kd is not None:
        labelled = predicted_tokens(batch, "labelled")
        rows = batch.get(FROM_TEACHER)
        rows = torch.zeros_like(labelled[:, 0]) if rows is None else rows
        if losses.task is not None:
            masks["task"] = labelled & ~rows[:, None]
        if losses.sequence_kd is not None:
            masks["sequence_kd"] = labelled & rows[:, None]
    return masks


@dataclass
class _Pass:
    """One forward of the student, and what its losses need."""

    batch: Batch
    counts: Counts
    scale: float
    trace: Trace
    hidden: Tensor


TokenLoss = Callable[[_Pass, Tensor, Tensor | int], Tensor]
"""(pass, positions bool [B, N], tokens to average over) → loss."""


class Objective:
    """The losses of a stage, as hooks on the student that add ``loss`` to what its forward returns.

    The teacher runs once a batch. Full logits are never made: both models run with
    ``logits_to_keep=1``, and the token losses go from the last hidden states through the output head
    in chunks. The hook sits on the model itself, so the loss is part of what DDP sees come out.

    Args:
        losses: Which, with weights.
        student: The converted student, not wrapped by peft.
        teacher: The frozen teacher, on the same device.
        autocast: Makes the context that both models compute in.
    """

    def __init__(
        self,
        losses: Losses,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.losses, self.student, self.autocast = losses, student, autocast
        self.values: dict[str, Tensor] = {}
        self.laid_out = bool(converted_attention(student))  # mixers are told of padding by the mask
        hidden, attention, kd = losses.hidden_states, losses.attention_weights, losses.token_kd
        own_stream = losses.of_predictions
        self.token_losses: dict[str, TokenLoss] = {}
        self._unchecked: list[tuple[PreTrainedModel, OutputHead, bool]] = []
        if own_stream:
            head = OutputHead(student)
            self._unchecked.append((student, head, False))
            self.token_losses |= {"task": _cross_entropy(head), "sequence_kd": _cross_entropy(head)}
            if kd is not None:
                teacher_head = OutputHead(teacher)
                self._unchecked.append((teacher, teacher_head, True))
                self.token_losses["token_kd"] = _token_kd(kd, head, teacher_head)
        self.aligned: dict[str, Alignment | WeightAlignment] = {}
        if attention is not None:
            self.aligned["attention_weights"] = WeightAlignment(teacher, student, attention)
        if hidden is not None:
            self.aligned["hidden_states"] = Alignment(student, hidden, own_stream)
        self.teacher = None
        if self.aligned or kd is not None:
            self.teacher = TeacherTrace(teacher, student, hidden, inputs=attention is not None)
        self.vision = SharedVision(teacher, student)
        self._pass: _Pass | None = None
        self._handles = [
            student.get_decoder().register_forward_hook(self._keep_hidden),
            student.register_forward_hook(self._add_loss),
        ]

    @contextlib.contextmanager
    def measure(self, batch: Batch, counts: Counts, scale: float = 1.0) -> Iterator[dict[str, Any]]:
        """Run the teacher on a batch and measure the student's forward inside the block.

        Args:
            batch: Right-padded, with ``labels``, and ``from_teacher`` if rows of both kinds are in it.
            counts: Tokens of each loss in the whole optimiser step, and its ``micro_batches``.
            scale: Factor on token losses: the number of processes that gradients are averaged over.

        Yields:
            The keyword arguments for the student's forward. What it returns has the weighted sum as
            ``loss``; :attr:`values` then holds this batch's share of each loss.
        """
        inputs = {k: v for k, v in batch.items() if k not in ("labels", FROM_TEACHER)}
        seen = inputs if self.laid_out else unmasked(inputs)
        kwargs: dict[str, Any] = {**seen, "use_cache": False, "logits_to_keep": 1}
        trace = Trace(valid_tokens(batch))
        if self.teacher is not None:
            with self.autocast(), self.vision.recorded():
                trace = self.teacher(inputs)
        if self.aligned:
            kwargs[TRACE] = trace
        self._pass = _Pass(batch, counts, scale, trace, torch.empty(0))
        try:
            with self.vision.replayed():
                yield kwargs
        finally:
            self._pass = None

    def close(self) -> None:
        """Remove all hooks from student and teacher."""
        for part in (*self.aligned.values(), self.teacher):
            if part is not None:
                part.close()
        for handle in self._handles:
            handle.remove()

    def _keep_hidden(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            self._pass.hidden = output[0]

    def _add_loss(self, student: nn.Module, args: Any, output: Any) -> Any:
        now = self._pass
        if now is None:
            return None
        with self.autocast():
            self._check_heads(now, output.logits)
            values = self._measure(now)
        self.values = {name: value.detach() for name, value in values.items()}
        output["loss"] = sum(weight * values[name] for name, weight in self.losses.weights.items())
        return output

    def _measure(self, now: _Pass) -> dict[str, Tensor]:
        values = {}
        if self.aligned:
            for name, loss in now.trace.finish(*self.aligned).items():
                values[name] = loss / now.counts[MICRO_BATCHES]
        for name, mask in token_masks(self.losses, now.batch).items():
            values[name] = now.scale * self.token_losses[name](now, mask, now.counts[name])
        return values

    def _check_heads(self, now: _Pass, logits: Tensor) -> None:
        for model, head, is_teacher in self._unchecked:
            hidden, made = (now.trace.hidden, now.trace.logits) if is_teacher else (now.hidden, logits[:, -1])
            check_head(model, head, hidden[:, -1], made)
        self._unchecked = []


def _token_kd(settings: TokenKD, head: OutputHead, teacher_head: OutputHead) -> TokenLoss:
    def measure(now: _Pass, mask: Tensor, count: Tensor | int) -> Tensor:
        return token_kd(
            head,
            teacher_head,
            now.hidden[mask],
            now.trace.hidden[mask],
            temperature=settings.temperature,
            chunk=settings.chunk,
            count=count,
        )

    return measure


def _cross_entropy(head: OutputHead) -> TokenLoss:
    def measure(now: _Pass, mask: Tensor, count: Tensor | int) -> Tensor:
        labels = now.batch["labels"].roll(-1, dims=1)[mask]
        return cross_entropy(head, now.hidden[mask], labels, count=count)

    return measure
