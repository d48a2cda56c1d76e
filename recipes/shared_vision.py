"""Teacher and student look at an image once: a frozen vision tower that is the teacher's is not run again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class SharedVision:
    """Keeps what the teacher's vision tower gave, and gives it to the student in its tower's place.

    Does nothing where there is no vision tower, or the student's is being trained or is another.

    Args:
        teacher: The frozen teacher.
        student: The student, with ``requires_grad`` set.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        self.teacher: Any = _vision_tower(teacher)
        self.student: Any = _vision_tower(student)
        self.shared = (
            self.teacher is not None and self.student is not None and _same(self.teacher, self.student)
        )
        self._outputs: list[Any] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the teacher's tower returns inside the block."""
        self._outputs = []
        if not self.shared:
            yield
            return
        # Copied, because models write into the output that they are given.
        hook = self.teacher.register_forward_hook(lambda m, a, out: self._outputs.append(copy.copy(out)))
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Let the student's tower return, inside the block, what was kept, in the same order."""
        if not self._outputs:
            yield
            return
        outputs = iter(self._outputs)
        self.student.forward = lambda *args, **kwargs: copy.copy(next(outputs))
        try:
            yield
        finally:
            del self.student.forward
            self._outputs = []


def _vision_tower(model: PreTrainedModel) -> nn.Module | None:
    tower = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


def _same(teacher: nn.Module, student: nn.Module) -> bool:
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    return (
        ours.keys() == theirs.keys()
        and not any(p.requires_grad for p in ours.values())
        and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    )
