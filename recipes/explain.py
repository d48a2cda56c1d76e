"""What a recipe will do to a model: what each stage trains and freezes, with counts, nothing being changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import bridges
from recipes.plan import Recipe, Stage
from recipes.selection import Selection, converted_attention, select


@dataclass(frozen=True)
class Group:
    """What one pattern matches.

    Attributes:
        pattern: As in the recipe.
        tensors: Weight tensors that train: matched parameters, or the two of each adapter.
        parameters: Numbers in them.
    """

    pattern: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class StageExplanation:
    """What one stage does.

    Attributes:
        name: Of the stage.
        active: Branches that take part; None: all.
        trained: What is trained in full, by pattern.
        adapted: What LoRA adds, by pattern.
        trained_tensors: Tensors that train, adapters included, each counted once.
        trained_parameters: Numbers in them.
        frozen_parameters: Numbers of the student that stay as they are.
        losses: Loss → weight.
        steps: Optimiser steps.
        minutes: How long it trains in place of them; None: as long as they take.
        rows_per_step: Rows of an optimiser step on one device, or at most so many.
        tokens_per_step: Its tokens at most, where they bound its rows; None elsewhere.
    """

    name: str
    active: tuple[str, ...] | None
    trained: tuple[Group, ...]
    adapted: tuple[Group, ...]
    trained_tensors: int
    trained_parameters: int
    frozen_parameters: int
    losses: dict[str, float]
    steps: int
    minutes: float | None
    rows_per_step: int
    tokens_per_step: int | None

    @property
    def length(self) -> str:
        """How long it trains, in words."""
        return f"{self.steps} steps" if self.minutes is None else f"{self.minutes:g} minutes in steps"


@dataclass(frozen=True)
class Explanation:
    """What a recipe does to a model; ``print`` it.

    Attributes:
        recipe: Its name.
        model: Class of the model.
        student: Converted layers, in words.
        parameters: Of the student.
        stages: One after the other.
    """

    recipe: str
    model: str
    student: str
    parameters: int
    stages: tuple[StageExplanation, ...]

    def __str__(self) -> str:
        console = Console(width=110, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(
                f"{self.recipe}: {self.model} of {self.parameters:,} parameters, {self.student}",
                highlight=False,
            )
            for number, stage in enumerate(self.stages, start=1):
                console.print(_table(number, stage))
        return captured.get().rstrip()


def explain(recipe: Recipe, model: nn.Module) -> Explanation:
    """Work out what each stage trains; see :meth:`recipes.plan.Recipe.explain`.

    The model is not changed: a copy without data is converted, on the meta device.
    """
    student = meta_copy(model)
    if not converted_attention(student):
        spec = recipe.student
        bridges.replace_attention(student, spec.mixer, layers=spec.layers, init=spec.init, **spec.config)
    mixers: dict[str, list[int]] = {}
    for index, attention in converted_attention(student).items():
        mixers.setdefault(type(attention.mixer).__name__, []).append(index)
    return Explanation(
        recipe=recipe.name,
        model=type(model).__name__,
        student="; ".join(f"{name} in {len(layers)} layers" for name, layers in mixers.items()),
        parameters=_count(student.parameters()),
        stages=tuple(_explain_stage(stage, student) for stage in recipe.stages),
    )


def meta_copy(model: Any) -> Any:
    """Copy a module with its tensors on the meta device: same shapes, no data."""
    tensors: dict[int, object] = {}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        tensors[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, tensors)


def _explain_stage(stage: Stage, student: nn.Module) -> StageExplanation:
    selection = select(stage, student)
    trained = list(selection.trained.values())
    rank = 0 if stage.lora is None else stage.lora.rank
    adapters = _adapter_parameters(selection, rank)
    return StageExplanation(
        name=stage.name,
        active=None if stage.active is None else tuple(stage.active),
        trained=tuple(_group(pattern, found) for pattern, found in selection.parameters.items()),
        adapted=tuple(
            Group(pattern, 2 * len(found), sum(_adapter(linear, rank) for linear in found.values()))
            for pattern, found in selection.adapted.items()
        ),
        trained_tensors=len(trained) + 2 * len(selection.linears),
        trained_parameters=_count(trained) + adapters,
        frozen_parameters=_count(student.parameters()) - _count(trained),
        losses=stage.losses.weights,
        steps=stage.steps,
        minutes=stage.minutes,
        rows_per_step=stage.batch_size * stage.gradient_accumulation,
        tokens_per_step=stage.batch_tokens and stage.batch_tokens * stage.gradient_accumulation,
    )


def _group(pattern: str, found: dict[str, nn.Parameter]) -> Group:
    unique = {id(p): p for p in found.values()}.values()
    return Group(pattern, len(unique), _count(unique))


def _adapter(linear: nn.Linear, rank: int) -> int:
    return rank * (linear.in_features + linear.out_features)


def _adapter_parameters(selection: Selection, rank: int) -> int:
    return sum(_adapter(linear, rank) for linear in selection.linears.values())


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _table(number: int, stage: StageExplanation) -> Table:
    active = "all branches" if stage.active is None else f"branches: {', '.join(stage.active)}"
    rows = f"{stage.rows_per_step} rows"
    if stage.tokens_per_step is not None:
        rows = f"at most {rows} and {stage.tokens_per_step:,} tokens"
    table = Table(
        title=f"Stage {number}, {stage.name}: {stage.length} of {rows}; {active}",
        title_justify="left",
    )
    table.add_column("what")
    table.add_column("pattern or loss", overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for what, groups in (("trained", stage.trained), ("LoRA on", stage.adapted)):
        for group in groups:
            # Text, since [ ] of a pattern would be read as markup.
            table.add_row(what, Text(group.pattern), f"{group.tensors:,}", f"{group.parameters:,}")
    table.add_section()
    table.add_row("trained", "(each once)", f"{stage.trained_tensors:,}", f"{stage.trained_parameters:,}")
    table.add_row("frozen", "", "", f"{stage.frozen_parameters:,}")
    table.add_section()
    for name, weight in stage.losses.items():
        table.add_row("loss", f"{weight:g} × {name}", "", "")
    return table
