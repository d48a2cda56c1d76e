"""Hidden-state alignment: hooks that show what the teacher did and measure how far the student is from it.

In the *injected* form each mixer of the student gets the input that the teacher's attention had, and its
output is compared with the teacher's; no gradient passes between layers, so each layer's is taken at once, and
one layer's graph is alive at a time. Where no other loss needs the student's own stream, the teacher's output
also goes on in place of the mixer's. Otherwise the mixer is called a second time, beside the stream. In the
*chained* form the student's own stream is compared.

The hooks run inside the student's forward, under whatever wraps it, and get the keyword
arguments that Hugging Face passes. What the teacher did comes to them as one of these, so gradient
checkpointing, which calls a layer again in the backward pass, compares it with the same batch again; a
forward without it, such as an evaluation between two steps, is left alone. A layer that runs again has its
gradient taken then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import bridges
from bridges.attention import LAYOUT_KWARG
from recipes.data.task import Batch, unmasked
from recipes.errors import LossError
from recipes.losses import hidden_state_loss, valid_tokens
from recipes.plan import HiddenStates
from recipes.recompute import recomputes
from recipes.selection import converted_attention
from recipes.settled import settled

TRACE = "linmu_trace"
"""Keyword argument by which a :class:`Trace` reaches the student's layers."""


@dataclass(eq=False)
class Trace:
    """What the teacher did with a batch, and how far from it the student is.

    Attributes:
        valid: bool [B, N], the tokens that are not padding.
        hidden: Last hidden states [B, N, D].
        logits: Those of the last token [B, V].
        inputs: Layer index → input of its attention [B, N, D].
        outputs: Layer index → output of its attention, or of the layer.
        losses: Loss → layer index → its value, while the student runs; None afterwards.
    """

    valid: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[str, dict[int, Tensor]] | None = field(default_factory=dict)
    _drawn: tuple[Tensor, Tensor] | None = None

    def compare(
        self, index: int, output: Tensor, vision: Tensor | None = None, alone: nn.Module | None = None
    ) -> None:
        """Measure the student's output at a layer; where ``vision`` [B, N] is given, of these tokens and text apart."""
        kinds = (self.valid,) if vision is None else (self.valid & ~vision, self.valid & vision)
        self.note("hidden_states", index, hidden_state_loss(output, self.outputs[index], *kinds), alone)

    def draw(self, count: int, vision: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw text tokens of each row at random, once: int [B, Q], and bool [B, Q] which of them are."""
        if self._drawn is None:
            text = self.valid if vision is None else self.valid & ~vision
            lots = torch.rand(text.shape, device=text.device).masked_fill(~text, -1)
            drawn = lots.topk(min(count, lots.shape[1]))
            self._drawn = drawn.indices, drawn.values >= 0
        return self._drawn

    def note(self, name: str, index: int, loss: Tensor, alone: nn.Module | None = None) -> None:
        """Keep a loss of a layer, unless the student has run.

        Args:
            name: Which loss.
            index: Which layer.
            loss: Its value.
            alone: Where given, the module whose parameters alone it depends on: its gradient is taken at once.
        """
        if self.losses is not None:
            loss = loss if alone is None else settled(loss, alone.parameters())
            self.losses.setdefault(name, {})[index] = loss

    def finish(self, *names: str) -> dict[str, Tensor]:
        """Return the named losses averaged over layers, when the student has run.

        Raises:
            LossError: No layer was compared.
        """
        found = {name: self.by_layer(name) for name in names}
        self.losses = None
        if not all(found.values()):
            raise LossError(
                "no layer was compared: the model does not pass keyword arguments on to its layers, so they "
                "cannot be aligned with its teacher's."
            )
        return {name: torch.stack(list(losses.values())).mean() for name, losses in found.items()}

    def by_layer(self, name: str) -> dict[int, Tensor]:
        """Return layer index → a loss, of the layers that have run so far."""
        return (self.losses or {}).get(name, {})


class TeacherTrace:
    """Runs the teacher once a batch and records what the losses of a stage need.

    Args:
        teacher: The frozen teacher.
        student: The converted student; its converted layers are the ones recorded.
        alignment: Settings of the hidden-state loss, None where a stage has none.
        inputs: Whether the inputs of attention are recorded, though the alignment does not ask for them.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: nn.Module,
        alignment: HiddenStates | None,
        *,
        inputs: bool = False,
    ) -> None:
        self.teacher = teacher
        self.trace: Trace | None = None
        self.handles = [teacher.get_decoder().register_forward_hook(self._keep_hidden)]
        attention = bridges.attention_layers(teacher)
        converted = converted_attention(student)
        if inputs or (alignment is not None and alignment.form == "injected"):
            for index in converted:
                self._record(attention[index], _Input(self, index))
        if alignment is not None:
            modules = attention if alignment.at == "attention" else _layers_of(teacher, attention)
            for index in converted:
                self._record(modules[index], _Output(self, index))

    def __call__(self, batch: Batch) -> Trace:
        """Run the teacher on a right-padded batch without labels."""
        trace = self.trace = Trace(valid_tokens(batch))
        try:
            with torch.no_grad():
                output = self.teacher(**unmasked(batch), use_cache=False, logits_to_keep=1)
            trace.logits = output.logits[:, -1]
        finally:
            self.trace = None
        return trace

    def close(self) -> None:
        """Remove the hooks."""
        remove(self.handles)

    def _record(self, module: nn.Module, hook: _Recorder) -> None:
        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _keep_hidden(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self.trace is not None:
            self.trace.hidden = output[0]


@dataclass
class _Recorder:
    """Forward hook on one of the teacher's modules."""

    owner: TeacherTrace
    index: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.owner.trace is not None:
            self.record(self.owner.trace, args, kwargs, output)

    def record(self, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        raise NotImplementedError


class _Input(_Recorder):
    """Keeps what went in."""

    def record(self, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.inputs[self.index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class _Output(_Recorder):
    """Keeps what came out."""

    def record(self, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.outputs[self.index] = _first(output)


class Alignment:
    """Hooks that measure the hidden-state loss while the student runs with a :data:`TRACE`.

    Args:
        student: The converted student.
        settings: Form and place of the comparison.
        own_stream: Whether another loss needs the student's own stream, which then must go on.
    """

    def __init__(self, student: nn.Module, settings: HiddenStates, own_stream: bool) -> None:
        self.handles: list[RemovableHandle] = []
        attention = converted_attention(student)
        modules = attention if settings.at == "attention" else _layers_of(student, attention)
        once = not recomputes(student)
        for index, module in modules.items():
            apart = settings.kinds == "apart"
            if settings.form == "chained":
                after: _Chained = _Chained(index, apart)
            elif own_stream:
                after = _Beside(index, apart, once)
            else:
                after = _Injected(index, apart, once)
                self.handles.append(module.register_forward_pre_hook(after.swap_input, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks."""
        remove(self.handles)


@dataclass
class _Chained:
    """Forward hook that compares a module's output; ``once``: and takes a gradient that is the module's alone."""

    index: int
    apart: bool
    once: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if (trace := kwargs.get(TRACE)) is not None:
            return self.compare(trace, module, args, kwargs, output)
        return None

    def compare(
        self, trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.measure(trace, module, kwargs, output)

    def measure(self, trace: Trace, module: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        layout = kwargs.get(LAYOUT_KWARG) if self.apart else None
        vision = None if layout is None else layout.vision
        trace.compare(self.index, _first(output), vision, module if self.once else None)


class _Injected(_Chained):
    """Hooks that give an attention module the teacher's input, and what follows it the teacher's output."""

    def swap_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        trace = kwargs.get(TRACE)
        return (args, kwargs) if trace is None else with_input(args, kwargs, trace.inputs[self.index])

    def compare(
        self, trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.measure(trace, module, kwargs, output)
        return trace.outputs[self.index], *output[1:]


class _Beside(_Chained):
    """Forward hook that calls the module once more, on the teacher's input."""

    def compare(
        self, trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        args, kwargs = with_input(args, kwargs, trace.inputs[self.index])
        self.measure(trace, module, kwargs, module.forward(*args, **kwargs))


def _layers_of(model: nn.Module, attention: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """Return the decoder layer that holds each attention module."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    return {index: modules[names[id(module)].rpartition(".")[0]] for index, module in attention.items()}


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an attention module's forward with another input."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()
