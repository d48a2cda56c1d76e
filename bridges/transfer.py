"""What becomes of each of the teacher's weights.

Nothing is reordered: the student's projections are the teacher's modules themselves, and every mixer
reads query head h with KV head h // (H/G), as the teacher does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from bridges.families import Family
from mixers import TokenMixer
from mixers.gated import Gated

Action = Literal["kept", "copied", "initialised", "dropped"]


@dataclass(frozen=True)
class Transfer:
    """What happens to one weight.

    Attributes:
        action: ``kept`` (the teacher's module itself), ``copied`` (a copy of it), ``initialised``
            (new), ``dropped`` (the teacher had it, the mixer has not).
        name: Parameter of the mixer, or what is dropped.
        shape: Its shape; None for what is dropped.
    """

    action: Action
    name: str
    shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.shape is None else f"{self.name} {list(self.shape)}"


def transfers(
    mixer: TokenMixer, attention: nn.Module, family: Family, init: str, dropped: list[str]
) -> list[Transfer]:
    """List what :func:`adopt_projections` and the mixer's own initialisation make of a layer's weights."""
    rows = []
    if init == "attention":
        for number, (prefix, _) in enumerate(_projection_owners(mixer)):
            action: Action = "kept" if number == 0 else "copied"
            for name in family.adopted:
                for parameter, tensor in getattr(attention, name).named_parameters():
                    if number and name == "o_proj" and parameter == "bias":
                        continue
                    rows.append(Transfer(action, f"{prefix}{name}.{parameter}", tuple(tensor.shape)))
    rows += [Transfer("initialised", name, tuple(p.shape)) for name, p in mixer.named_parameters()]
    if init == "random":
        teachers = [
            f"{name}.{p}" for name in family.adopted for p, _ in getattr(attention, name).named_parameters()
        ]
        dropped = teachers + dropped
    return rows + [Transfer("dropped", what) for what in dropped]


def adopt_projections(mixer: TokenMixer, attention: nn.Module, family: Family) -> None:
    """Put the teacher's projections into a mixer built with ``projections=False``.

    Where each branch has its own set, the first holds the teacher's modules and the others copies,
    whose output bias is left out because the branches' outputs are summed.
    """
    for number, (_, owner) in enumerate(_projection_owners(mixer)):
        for name in family.adopted:
            module = getattr(attention, name)
            if number:
                module = copy.deepcopy(module)
                if name == "o_proj":
                    module.bias = None
            setattr(owner, name, module)


def _projection_owners(mixer: TokenMixer) -> Iterator[tuple[str, TokenMixer]]:
    """Yield (name prefix, mixer) of each set of projections the mixer needs."""
    if isinstance(mixer, Gated) and not mixer.config.share_projections:
        for name, branch in mixer.branches.items():
            yield f"branches.{name}.", branch
    else:
        yield "", mixer
