"""What a stage minimises: its named losses, weighed, measured while the student's forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.alignment import TRACE, Alignment, TeacherTrace, Trace
from recipes.data.task import Batch
from recipes.losses import check_head, cross_entropy, output_head, predicted_tokens, token_kd
from recipes.plan import Losses
from recipes.shared_vision import SharedVision

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


class Objective:
    """The losses of a stage, as hooks on the student that add ``loss`` to what its forward returns.

    The teacher runs once a batch. Full logits are never made: both models run with
    ``logits_to_keep=1``, and the token losses go from the last hidden states through the output head
    in chunks. The hook sits on the model itself, so it runs inside DDP and FSDP, where weights are whole.

    Args:
        losses: Which, with weights.
        student: The converted student, not wrapped by peft.
        teacher: The frozen teacher, on the same device.
        autocast: Makes the context that both models compute in.
    """

    def __init__(
        self,
        losses: Losses,
        student: nn.Module,
        teacher: nn.Module,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.losses, self.student, self.autocast = losses, student, autocast
        self.values: dict[str, Tensor] = {}
        own_stream = bool(set(losses.weights) - {"hidden_states"})
        hidden = losses.hidden_states
        self.alignment = None if hidden is None else Alignment(student, hidden, own_stream)
        needs_teacher = hidden is not None or losses.token_kd is not None
        self.teacher = TeacherTrace(teacher, student, hidden) if needs_teacher else None
        self.vision = SharedVision(teacher, student)
        self.student_head = output_head(student) if own_stream else None
        self.teacher_head = output_head(teacher) if losses.token_kd is not None else None
        self._heads_checked = False
        self._batch: Batch | None = None
        self._trace: Trace | None = None
        self._hidden = torch.empty(0)
        self._handles = [
            student.get_decoder().register_forward_hook(self._keep_hidden),
            student.register_forward_hook(self._add_loss),
        ]

    @contextlib.contextmanager
    def measure(self, batch: Batch, counts: Counts, scale: float = 1.0) -> Iterator[dict[str, Any]]:
        """Run the teacher on a batch and measure the student's forward inside the block.

        Args:
            batch: With ``labels``, and ``from_teacher`` if rows of both kinds are in it.
            counts: Tokens of each loss in the whole optimiser step, and its ``micro_batches``.
            scale: Factor on token losses: the number of processes that gradients are averaged over.

        Yields:
            The keyword arguments for the student's forward. What it returns has the weighted sum as
            ``loss``; :attr:`values` then holds this batch's share of each loss.
        """
        inputs = {k: v for k, v in batch.items() if k not in ("labels", FROM_TEACHER)}
        kwargs: dict[str, Any] = {**inputs, "use_cache": False, "logits_to_keep": 1}
        if self.teacher is not None:
            with self.autocast(), self.vision.recorded():
                self._trace = self.teacher(inputs)
        if self.alignment is not None:
            kwargs[TRACE] = self._trace
        self._batch, self._counts, self._scale = batch, counts, scale
        try:
            with self.vision.replayed():
                yield kwargs
        finally:
            self._batch, self._trace, self._hidden = None, None, torch.empty(0)

    def close(self) -> None:
        """Remove all hooks from student and teacher."""
        for part in (self.alignment, self.teacher):
            if part is not None:
                part.close()
        for handle in self._handles:
            handle.remove()

    def _keep_hidden(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._batch is not None:
            self._hidden = output[0]

    def _add_loss(self, student: nn.Module, args: Any, output: Any) -> Any:
        if self._batch is None:
            return None
        with self.autocast():
            if not self._heads_checked:
                self._check_heads(output.logits)
            values = self._measure(self._batch)
        self.values = {name: value.detach() for name, value in values.items()}
        output["loss"] = sum(weight * values[name] for name, weight in self.losses.weights.items())
        return output

    def _measure(self, batch: Batch) -> dict[str, Tensor]:
        values = {}
        if self.alignment is not None:
            values["hidden_states"] = self._trace.finish() / self._counts[MICRO_BATCHES]
        for name, mask in token_masks(self.losses, batch).items():
            count, hidden = self._counts[name], self._hidden[mask]
            if name == "token_kd":
                kd = self.losses.token_kd
                target = self._trace.hidden[mask]
                value = token_kd(
                    self.student_head,
                    self.teacher_head,
                    hidden,
                    target,
                    temperature=kd.temperature,
                    chunk=kd.chunk,
                    count=count,
                )
            else:
                labels = batch["labels"].roll(-1, dims=1)[mask]
                value = cross_entropy(self.student_head, hidden, labels, count=count)
            values[name] = self._scale * value
        return values

    def _check_heads(self, logits: Tensor) -> None:
        if self.student_head is not None:
            check_head(self.student, self.student_head, self._hidden[:, -1], logits[:, -1])
        if self.teacher_head is not None:
            check_head(self.teacher.teacher, self.teacher_head, self._trace.hidden[:, -1], self._trace.logits)
        self._heads_checked = True
