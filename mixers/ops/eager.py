"""Custom ops that eager calls pass by: torch's machinery around one takes about as long as its function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class EagerOp:
    """A function that is a custom op where torch traces, and else is called as it is.

    The custom op is what torch.compile and torch.export see, dispatch modes, torch.func, and tensors that are
    no memory: fakes, those of the meta device, subclasses. All others get the same values from the function
    itself, through a plain :class:`torch.autograd.Function` where a gradient is needed. Arguments are
    given by position; sequences of tensors may be among them.

    Attributes:
        run: The function. It may neither change an argument nor return a view of one, as for a custom op.
        op: The custom op.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run = run
        self.op = torch.library.custom_op(name, mutates_args=())(run)
        self.register_fake = self.op.register_fake
        self._function: Any = None

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """Say how to differentiate it, as for a custom op, but ``ctx.needs_input_grad`` has no lists."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *flat_and_args: Any) -> Any:
            args = flat_and_args[-1]
            output = self.run(*args)
            setup_context(ctx, args, output)
            return output

        def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *_flat(backward(ctx, *grads)), None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._function = type(self.run.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """Run the function or, where torch traces, the custom op."""
        if torch.compiler.is_compiling():
            return self.op(*args)
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return self.op(*args)
        flat = _flat(args)
        tensors = [arg for arg in flat if isinstance(arg, Tensor)]
        if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors):
            return self.op(*args)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return self.run(*args)
        # Without a formula for its gradient the custom op raises, but only once that gradient is asked for.
        return self.op(*args) if self._function is None else self._function.apply(*flat, args)


def custom_op(name: str) -> Callable[[Callable[..., Any]], EagerOp]:
    """Decorate a function to register it as a custom op that eager calls pass by."""
    return lambda run: EagerOp(name, run)


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments, with the items of sequences in their place: autograd sees no tensor inside of another."""
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            flat += arg
        else:
            flat.append(arg)
    return flat
