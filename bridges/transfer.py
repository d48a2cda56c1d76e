"""What becomes of each of the teacher's weights.

No head is reordered: the student's projections are the teacher's modules themselves, or parts of a
fused one, and every mixer reads query head h with KV head h // (H/G), as the teacher does.
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

Action = Literal["kept", "split", "copied", "initialised", "dropped"]


@dataclass(frozen=True)
class Transfer:
    """What happens to one weight.

    Attributes:
        action: ``kept`` (the teacher's module itself), ``split`` (copied out of a fused or transposed
            weight), ``copied`` (a copy for another branch), ``initialised`` (new), ``dropped`` (the
            teacher had it, the mixer has not).
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
        own = {id(module) for module in attention.children()}
        for number, (prefix, _) in enumerate(_projection_owners(mixer)):
            for name, module in family.projections(attention).items():
                first: Action = "kept" if id(module) in own else "split"
                for parameter, tensor in module.named_parameters():
                    if number and name == "o_proj" and parameter == "bias":
                        continue
                    action: Action = "copied" if number else first
                    rows.append(Transfer(action, f"{prefix}{name}.{parameter}", tuple(tensor.shape)))
    rows += [Transfer("initialised", name, tuple(p.shape)) for name, p in mixer.named_parameters()]
    if init == "random":
        theirs = [name for name, _ in attention.named_parameters()]
        dropped = [name for name in theirs if name not in dropped] + dropped
    return rows + [Transfer("dropped", what) for what in dropped]


def adopt_projections(mixer: TokenMixer, attention: nn.Module, family: Family) -> None:
    """Put the teacher's projections into a mixer built with ``projections=False``.

    Where each branch has its own set, the first holds the teacher's modules and the others copies,
    whose output bias is left out because the branches' outputs are summed. Parts of a fused weight
    are copied too: a file cannot hold weights that share memory.
    """
    own = {id(module) for module in attention.children()}
    for number, (_, owner) in enumerate(_projection_owners(mixer)):
        for name, module in family.projections(attention).items():
            if number or id(module) not in own:
                module = copy.deepcopy(module)
                for parameter in module.parameters():
                    parameter.data = parameter.data.contiguous()
                if number and name == "o_proj":
                    module.register_parameter("bias", None)
            setattr(owner, name, module)


def _projection_owners(mixer: TokenMixer) -> Iterator[tuple[str, TokenMixer]]:
    """Yield (name prefix, mixer) of each set of projections the mixer needs."""
    if isinstance(mixer, Gated) and not mixer.config.share_projections:
        for name, branch in mixer.branches.items():
            yield f"branches.{name}.", branch
    else:
        yield "", mixer
