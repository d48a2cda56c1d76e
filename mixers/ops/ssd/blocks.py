"""The SSD scan block by block, so that memory beyond inputs and outputs is one block's and the states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.ops.ssd.chunks import Cut, Edge, Tables, mix_block, sweep_block
from mixers.precision import without_autocast


@dataclass(frozen=True)
class Plan:
    """How a row is read: in which order, in blocks of how many tokens, and what its steps are.

    Attributes:
        order: [B, N] token read at each step; None where it is the identity.
        tables: What the steps are.
        step: Tokens of a block.
        cut: How a block is cut into chunks.
        both: Whether vision is scanned backward too.
    """

    order: Tensor | None
    tables: Tables
    step: int
    cut: Cut
    both: bool

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.tables.valid.shape[1] // self.step)

    def part(self, i: int) -> Tables:
        """Tables of block i."""
        return Tables(*(t[:, i * self.step : (i + 1) * self.step] for t in self.tables))

    def take(self, t: Tensor, i: int) -> Tensor:
        """Tokens of block i of t [B, N, …], in reading order."""
        if self.order is None:
            return t[:, i * self.step : (i + 1) * self.step]
        return t.flatten(0, 1).index_select(0, self._index(i)).unflatten(0, (len(t), -1))

    def add(self, whole: Tensor, part: Tensor, i: int) -> None:
        """Add the tokens of block i to contiguous ``whole`` [B, N, …]; the transpose of :meth:`take`."""
        if self.order is None:
            whole[:, i * self.step : (i + 1) * self.step] += part
        else:
            whole.view(-1, *whole.shape[2:]).index_add_(0, self._index(i), part.flatten(0, 1))

    def before(self, i: int, state: Tensor) -> Edge:
        """The forward state that enters block i, with its sequence."""
        return Edge(state, self.tables.sequence[:, max(i * self.step - 1, 0)])

    def after(self, i: int, state: Tensor) -> Edge:
        """The backward state that enters block i, with its extent."""
        extent, end = self.tables.extent, (i + 1) * self.step
        return Edge(state, extent[:, end] if end < extent.shape[1] else torch.full_like(extent[:, 0], -1))

    def _index(self, i: int) -> Tensor:
        assert self.order is not None
        order = self.order[:, i * self.step : (i + 1) * self.step]
        rows = torch.arange(len(order), device=order.device)[:, None] * self.order.shape[1]
        return (rows + order).flatten()


def scan_blocks(plan: Plan, state: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Scan all blocks from a forward state; return y in token order and the state after the last."""
    with without_autocast(state.device):
        if plan.blocks > 1:
            return _Scan.apply(plan, state, *inputs)
        after = plan.after(0, torch.zeros_like(state)) if plan.both else None
        given = tuple(plan.take(t, 0) for t in inputs)
        mixed, state = mix_block(given, plan.tables, plan.cut, plan.before(0, state), after)
        if plan.order is None:
            return mixed, state
        y = mixed.new_zeros(mixed.shape)
        plan.add(y, mixed, 0)
        return y, state


class _Scan(torch.autograd.Function):
    """Keeps the inputs and the states between blocks; its backward mixes each block again."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        def block(i: int) -> tuple[tuple[Tensor, ...], Tables, Cut]:
            return tuple(plan.take(t, i) for t in inputs), plan.part(i), plan.cut

        befores, afters = [], []  # the states that enter each block, from the left and from the right
        if plan.both:
            afters = [torch.zeros_like(state)]
            for i in range(plan.blocks - 1, 0, -1):
                afters.insert(0, sweep_block(*block(i), plan.after(i, afters[0])))
        c, _, x = inputs[:3]
        y = x.new_zeros(*c.shape[:3], x.shape[-1])
        for i in range(plan.blocks):
            befores.append(state)
            after = plan.after(i, afters[i]) if plan.both else None
            mixed, state = mix_block(*block(i), plan.before(i, state), after)
            plan.add(y, mixed, i)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, *befores, *afters)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        n, saved = plan.blocks, ctx.saved_tensors
        own = len(saved) - n * (1 + plan.both)
        inputs, befores, afters = saved[:own], saved[own : own + n], saved[own + n :]
        grads = tuple(t.new_zeros(t.shape) for t in inputs)

        def leaf(t: Tensor) -> Tensor:
            return t.detach().requires_grad_()

        def add(found: tuple[Tensor | None, ...], i: int) -> None:
            for whole, part in zip(grads, found):
                if part is not None:
                    plan.add(whole, part, i)

        to_afters: list[Tensor] = []
        with without_autocast(grad_y.device):
            for i in range(n - 1, -1, -1):
                leaves = [
                    leaf(t) for t in (*(plan.take(t, i) for t in inputs), befores[i], *afters[i : i + 1])
                ]
                given, before = tuple(leaves[:own]), plan.before(i, leaves[own])
                with torch.enable_grad():
                    after = plan.after(i, leaves[-1]) if plan.both else None
                    out = mix_block(given, plan.part(i), plan.cut, before, after)
                found = torch.autograd.grad(out, leaves, (plan.take(grad_y, i), grad_state))
                add(found[:own], i)
                grad_state = found[own]
                to_afters.insert(0, found[-1])
            for i in range(1, n) if plan.both else ():
                leaves = [leaf(t) for t in (*(plan.take(t, i) for t in inputs), afters[i])]
                with torch.enable_grad():
                    swept = sweep_block(
                        tuple(leaves[:own]), plan.part(i), plan.cut, plan.after(i, leaves[own])
                    )
                found = torch.autograd.grad(swept, leaves, to_afters[i - 1], allow_unused=True)
                add(found[:own], i)
                to_afters[i] = to_afters[i] + found[own]
        return None, grad_state, *grads
