"""Projections that a family holds fused or transposed, as linear layers over parts of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None, *, trains: bool) -> nn.Linear:
    """Return a linear layer that holds these very tensors, views or not.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        trains: Whether they take gradients.
    """
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=trains)
    return module


def split_rows(weight: Tensor, bias: Tensor | None, *widths: int, trains: bool) -> list[nn.Linear]:
    """Return a linear layer over each of the consecutive spans of a weight's rows.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        *widths: Rows of each.
        trains: Whether they take gradients.
    """
    biases = [None] * len(widths) if bias is None else bias.split(widths)
    return [linear(part, own, trains=trains) for part, own in zip(weight.split(widths), biases)]
