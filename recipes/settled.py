"""Losses whose gradients are taken as soon as they are known, so that what they were made of can go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mixers.precision import without_autocast


def settled(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Take the gradient of a loss now, and hand it on when the backward pass asks for it.

    The graph behind the loss is freed; gradients of the parameters are held in its place. The backward pass itself
    is as ever for whatever listens to it: hooks, accumulation, data parallelism.

    Args:
        loss: A number. One that needs no gradient is returned as it is.
        parameters: All leaves that it depends on and that learn; others may be among them.

    Returns:
        The loss, of the same value and gradient.
    """
    leaves = [p for p in parameters if p.requires_grad]
    if not loss.requires_grad or not leaves:
        return loss
    with without_autocast(loss.device):  # as a backward pass is, which runs behind the forward's context
        found = zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True))
    reached = [(leaf, gradient) for leaf, gradient in found if gradient is not None]
    return _Settled.apply(
        loss.detach(), [gradient for _, gradient in reached], *(leaf for leaf, _ in reached)
    )


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, grad[0])
