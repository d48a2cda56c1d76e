"""RMS norms as one kernel: transformers makes eight of each, and a training step may be bound by their number."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.precision import without_autocast


@contextlib.contextmanager
def fused_norms(*models: nn.Module) -> Iterator[None]:
    """Let the RMS norms of models be torch's own kernel inside the block.

    Those that do anything but divide by the root mean square and multiply by their weight, as Gemma's do, are left
    alone. What a norm gives has the dtype that it had, and is rounded once rather than twice.
    """
    fused = [
        module for module in dict.fromkeys(m for model in models for m in model.modules()) if _plain(module)
    ]
    for module in fused:
        module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in fused:
            del module.forward


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with without_autocast(x.device):
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), _epsilon(module))


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def _plain(module: nn.Module) -> bool:
    """Whether a module is an RMS norm that gives what :func:`_norm` gives."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    if _epsilon(module) is None or "forward" in vars(module):
        return False
    # As large and as small as the epsilon makes a difference.
    spread = torch.linspace(-1, 1, len(weight), dtype=weight.dtype).to(weight.device)
    x = torch.stack([spread, 1e-3 * spread])
    found, wanted = _norm(module, x), module(x)
    close = torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=1e-5)
    return found.dtype == wanted.dtype and close
