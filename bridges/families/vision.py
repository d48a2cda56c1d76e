"""What the families that see have in common: the clips of a batch, found row by row from runs of a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bridges import errors
from bridges.errors import LayoutCaptureError, LayoutFallbackWarning
from bridges.families.family import Clips, Family
from mixers import TokenMixer
from mixers.attention import Attention
from mixers.bimamba2 import BiMamba2
from mixers.swin3d import Swin3D

Run = tuple[int, int]


class VisionFamily(Family):
    """A decoder whose rows hold images or videos in the place of tokens of their own."""

    vision_inputs: tuple[str, ...] = ("pixel_values",)
    """Keyword arguments that come with images or videos alone."""
    bidirectional = False
    """Whether the teacher attends in both directions within an image."""

    def twin_fields(self, attention: Any) -> dict[str, Any]:
        """Let the twin look ahead where the teacher does; see :meth:`Family.twin_fields`."""
        return {**super().twin_fields(attention), "bidirectional": self.bidirectional}

    def dropped(self, attention: Any, mixer: TokenMixer) -> list[str]:
        """Name the attention within images that a causal mixer has not; see :meth:`Family.dropped`."""
        if not self.bidirectional or any(_looks_ahead(part) for part in mixer.modules()):
            return []
        return ["attention in both directions within an image"]

    def clips(self, config: Any, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> Clips | None:
        """Find the vision tokens of a batch; see :meth:`Family.clips`.

        Embeddings without ids are read as text, with a :class:`bridges.LayoutFallbackWarning`.
        """
        given = [name for name in self.vision_inputs if inputs.get(name) is not None]
        if input_ids is None:
            if given:
                raise LayoutCaptureError(
                    f"{', '.join(given)} came without input_ids, which alone say where vision stands; pass them, or "
                    "the layout itself to forward as linmu_layout."
                )
            if inputs.get("inputs_embeds") is not None:
                warn_once(
                    config,
                    "inputs_embeds came without input_ids, so every token is read as text; pass the layout to "
                    "forward as linmu_layout if there is vision among them",
                )
            return None
        table = ClipTable(input_ids)
        if not given and not any(bool((table.ids == token).any()) for token in self.vision_tokens(config)):
            return None
        self.place(table, config, inputs)
        return Clips(table.clip.to(input_ids.device), table.coords.to(input_ids.device))

    def vision_tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids that stand for vision."""
        return (config.image_token_id,)

    def place(self, table: ClipTable, config: Any, inputs: Mapping[str, Any]) -> None:
        """Add every clip of the batch to the table; see :meth:`Family.clips` for the rest."""
        raise NotImplementedError


def _looks_ahead(part: Any) -> bool:
    return isinstance(part, BiMamba2 | Swin3D) or (isinstance(part, Attention) and part.config.bidirectional)


class ClipTable:
    """The clips of a batch while they are being found.

    Args:
        input_ids: int [B, N].

    Attributes:
        ids: [B, N] on the CPU.
        clip: int [B, N], clip number within its row, -1 at text.
        coords: int [B, N, 3], (t, h, w) of vision tokens.
    """

    def __init__(self, input_ids: Tensor) -> None:
        self.ids = input_ids.cpu()
        self.clip = torch.full_like(self.ids, -1)
        self.coords = torch.zeros(*self.ids.shape, 3, dtype=torch.long)
        self._count = [0] * len(self.ids)

    def add(self, row: int, slots: Tensor, coords: Tensor) -> None:
        """Make one clip of the tokens at ``slots`` [n] of a row, which stand at ``coords`` [n, 3]."""
        self.clip[row, slots] = self._count[row]
        self.coords[row, slots] = coords
        self._count[row] += 1

    def slots(self, token: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, where the token stands in it [n]) of each row that has it."""
        for row, ids in enumerate(self.ids):
            found = (ids == token).nonzero().flatten()
            if len(found):
                yield row, found

    def runs(self, token: int) -> Iterator[tuple[int, list[Run]]]:
        """Yield (row, its runs of the token) of each row that has it."""
        for row, slots in self.slots(token):
            parts = slots.tensor_split((slots.diff() != 1).nonzero().flatten() + 1)
            yield row, [(int(part[0]), int(part[-1]) + 1) for part in parts]


def warn_once(config: Any, what: str) -> None:
    """Warn of a fallback, once for each class of model."""
    errors.warn_once(f"{config.model_type}: {what}.", LayoutFallbackWarning, 3)
