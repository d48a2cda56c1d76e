"""Layers that run again in the backward pass, to save memory."""

from __future__ import annotations

from typing import Any

from torch import nn


def recompute_layers(model: Any) -> None:
    """Let the layers of a model run again in the backward pass; versions of transformers name that differently."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recomputes(model: nn.Module) -> bool:
    """Return whether a layer of a model runs again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
