"""What a stage trains of a student, worked out and checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

import bridges
from mixers.errors import near
from mixers.gated import Gated
from recipes.errors import BranchError, LossError, PatternError
from recipes.plan import LoRA, Stage

MIXERS = "mixers"
"""The pattern that stands for every parameter of every mixer."""


@dataclass(frozen=True)
class Selection:
    """The weights that a stage trains.

    Attributes:
        parameters: Pattern → parameter name → parameter, trained in full.
        adapted: Pattern → name of a linear layer → the layer, which gets an adapter.
    """

    parameters: dict[str, dict[str, nn.Parameter]]
    adapted: dict[str, dict[str, nn.Linear]]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter trained in full, each once."""
        named = {name: p for group in self.parameters.values() for name, p in group.items()}
        first = {id(p): name for name, p in reversed(named.items())}
        return {name: p for name, p in named.items() if first[id(p)] == name}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Name → linear layer with an adapter, each once."""
        return {name: linear for group in self.adapted.values() for name, linear in group.items()}


def select(stage: Stage, student: nn.Module) -> Selection:
    """Find what a stage trains in a converted model, and check that its parts fit each other.

    Raises:
        PatternError: A pattern matches nothing, or a weight is both trained in full and adapted.
        BranchError: A branch to activate does not exist.
        LossError: A loss cannot be computed, or no loss reaches some of what is trained.
    """
    selection = Selection(_match_parameters(stage, student), _match_linears(stage.lora, student))
    _check_conflicts(stage, selection)
    _check_factors(stage, selection)
    _check_branches(stage, student)
    _check_losses(stage, student, selection)
    return selection


def converted_attention(student: nn.Module) -> dict[int, bridges.MixerAttention]:
    """Return decoder layer index → its attention, of the layers that have a mixer."""
    modules = bridges.attention_layers(student)
    return {i: module for i, module in modules.items() if isinstance(module, bridges.MixerAttention)}


def activate(student: nn.Module, branches: Iterable[str] | None) -> None:
    """Let the named branches (None: all) of every gated mixer take part."""
    for mixer in _gated(student):
        mixer.set_active(branches)


def _gated(student: nn.Module) -> list[Gated]:
    mixers = (attention.mixer for attention in converted_attention(student).values())
    return [mixer for mixer in mixers if isinstance(mixer, Gated)]


def _mixer_parameters(student: nn.Module) -> set[int]:
    mixers = (attention.mixer for attention in converted_attention(student).values())
    return {id(p) for mixer in mixers for p in mixer.parameters()}


def _match_parameters(stage: Stage, student: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    # Tied weights are found under each of their names.
    named = dict(student.named_parameters(remove_duplicate=False))
    inside = _mixer_parameters(student) if MIXERS in stage.trainable else set()
    matches = {}
    for pattern in stage.trainable:
        if pattern == MIXERS:
            matches[pattern] = {name: p for name, p in named.items() if id(p) in inside}
        else:
            matches[pattern] = {name: p for name, p in named.items() if re.search(pattern, name)}
        if not matches[pattern]:
            raise PatternError(
                f"stage {stage.name!r}: the pattern {pattern!r} matches no parameter of the student."
                f"{near(pattern, _name_parts(named))} Patterns are regular expressions searched in names such "
                f"as {_example(named)!r}; {MIXERS!r} stands for all of the mixers."
            )
    return matches


def _match_linears(lora: LoRA | None, student: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    if lora is None:
        return {}
    linears = {name: m for name, m in student.named_modules() if isinstance(m, nn.Linear)}
    matches = {p: {n: m for n, m in linears.items() if re.search(p, n)} for p in lora.targets}
    for pattern, found in matches.items():
        if not found:
            raise PatternError(
                f"the LoRA target {pattern!r} matches no linear layer of the student."
                f"{near(pattern, _name_parts(linears))} Targets are regular expressions searched in names such "
                f"as {_example(linears)!r}."
            )
    return matches


def _name_parts(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".") if not part.isdigit()}


def _example(names: Iterable[str]) -> str:
    ordered = list(names)
    return ordered[len(ordered) // 2]


def _check_conflicts(stage: Stage, selection: Selection) -> None:
    trained = {id(p): name for name, p in selection.trained.items()}
    for name, linear in selection.linears.items():
        if id(linear.weight) in trained:
            raise PatternError(
                f"stage {stage.name!r}: {name} is a LoRA target and {trained[id(linear.weight)]} is trained in "
                "full; leave it out of one of the two."
            )


def plain_name(name: str) -> str:
    """Return what a :class:`Selection` calls a parameter, or the layer that it adapts, by its name under peft."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _check_factors(stage: Stage, selection: Selection) -> None:
    names = {*selection.trained, *selection.linears}
    for pattern in stage.optimizer.factors:
        if not any(re.search(pattern, name) for name in names):
            raise PatternError(
                f"stage {stage.name!r}: the factor on the rate of {pattern!r} reaches nothing that the stage trains."
                f"{near(pattern, _name_parts(names))} It trains such as {_example(sorted(names))!r}."
            )


def _check_branches(stage: Stage, student: nn.Module) -> None:
    if stage.active is None:
        return
    gated = _gated(student)
    if not gated:
        raise BranchError(
            f"stage {stage.name!r} activates {stage.active}, but no mixer of the student has branches; leave "
            "out 'active', or take a gated mixer such as 'mmate'."
        )
    for mixer in gated:
        for branch in stage.active:
            if branch not in mixer.branches:
                raise BranchError(
                    f"stage {stage.name!r} activates {branch!r}, which layer {mixer.config.layer_idx} does not "
                    f"have.{near(branch, mixer.branches)} Branches: {', '.join(mixer.branches)}."
                )


def _check_losses(stage: Stage, student: Any, selection: Selection) -> None:
    losses = stage.losses
    converted = converted_attention(student)
    for name in ("hidden_states", "attention_weights"):
        if name in losses.weights and not converted:
            raise LossError(
                f"stage {stage.name!r} aligns {name.replace('_', ' ')}, but no layer of the student is converted."
            )
    if losses.attention_weights is not None:
        for index, attention in converted.items():
            if not attention.mixer.averages:
                raise LossError(
                    f"stage {stage.name!r} aligns attention weights, but the {type(attention.mixer).__name__} of "
                    f"layer {index} has none: it gives no average of values. Take the loss out, or a mixer that "
                    "does, such as 'mmate' (normalizer: denominator, share_projections: true)."
                )
    if losses.of_predictions:
        if student.get_output_embeddings() is None:
            raise LossError(
                f"stage {stage.name!r} needs next-token predictions, but {type(student).__name__} has no output "
                "head; load it as a model for generation."
            )
        return
    if losses.hidden_states is None or losses.hidden_states.form == "injected":
        inside = _mixer_parameters(student)
        outside = [name for name, p in selection.trained.items() if id(p) not in inside]
        outside += [name for name, linear in selection.linears.items() if id(linear.weight) not in inside]
        if outside:
            raise LossError(
                f"stage {stage.name!r}: alignment on the teacher's inputs reaches the mixers alone, so {outside[0]} "
                f"(and {len(outside) - 1} more) would never change; freeze them or add another loss."
            )
