"""Data-dependent decay and step size of an SSD scan, kept in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_DT = 0.1
MEMORY_TOKENS = (8, 4096)
"""Shortest and longest memory, in tokens, that scans start with unless told otherwise."""


class Rates(nn.Module):
    """The parameters A_log and dt_bias [E], which stay fp32 when the model is cast.

    Args:
        heads: E.
        memory: Tokens after which the first and the last head keep 1/e at the start, the others log-spaced between.
    """

    def __init__(self, heads: int, memory: tuple[float, float] = MEMORY_TOKENS) -> None:
        super().__init__()
        low, high = map(math.log, memory)
        spread = [head / (heads - 1) for head in range(heads)] if heads > 1 else [0.5]
        logs = [low + share * (high - low) for share in spread]
        # Not by torch.linspace: within torch.device it stays on the CPU once transformers has loaded a model.
        self.A_log = nn.Parameter(-torch.tensor(logs, dtype=torch.float32) - math.log(INITIAL_DT))
        self.dt_bias = nn.Parameter(
            torch.full((heads,), math.log(math.expm1(INITIAL_DT)), dtype=torch.float32)
        )

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Map raw [B, N, E] to (log_a, dt), both fp32: dt = softplus(raw + dt_bias), log_a = -exp(A_log)·dt."""
        wide = torch.promote_types(raw.dtype, torch.float32)
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        return -self.A_log.to(wide).exp() * dt, dt

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rates:
        """Follow a move to another device and to fp64, not a cast to a narrower type."""

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            if not moved.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
                return moved
            return torch.empty_like(moved, dtype=t.dtype) if t.is_meta else t.to(device=moved.device)

        return super()._apply(keep_wide, recurse)


class Decay(nn.Module):
    """(log_a, dt) of each token from its hidden state (Mamba2, arXiv 2405.21060).

    Args:
        dim: Model width D.
        heads: Decays E: one a KV head, or one a query head.
        memory: As for :class:`Rates`.
    """

    def __init__(self, dim: int, heads: int, memory: tuple[float, float] = MEMORY_TOKENS) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, heads, bias=False)
        nn.init.normal_(self.proj.weight, std=0.01)
        self.rates = Rates(heads, memory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [B, N, D] to (log_a, dt), each fp32 [B, N, E], log_a ≤ 0 ≤ dt."""
        return self.rates(self.proj(x))
