"""What a peer is, and whether it can run here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.bench.cases import Inputs, Problem


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: Who.
        cases: Which of our cases it stands beside.
        unavailable: Returns why it cannot run here, or None.
        prepare: From a case's arguments and its problem to the peer's, outside the clock.
        run: What is timed.
        right: What ``run`` should give, called with the same arguments in fp64.
        another: What it computes instead, where that is not what our op does: then it is shown, and never
            counted as the best peer.
        gradients: Whether it has a backward.
    """

    name: str
    cases: tuple[str, ...]
    unavailable: Callable[[], str | None]
    prepare: Callable[[Inputs, Problem], tuple[Any, ...]]
    run: Callable[..., Tensor]
    right: Callable[..., Tensor]
    another: str | None = None
    gradients: bool = True


def needs(*modules: str) -> Callable[[], str | None]:
    """Return a function that says why CUDA or one of the modules cannot be used, or None."""

    def reason() -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        for module in modules:
            try:
                if module.startswith("mamba_ssm"):
                    _without_cuda_extension("mamba_ssm")
                importlib.import_module(module)
            except Exception as error:
                return f"{module} does not import: {type(error).__name__}: {error}".splitlines()[0][:200]
        return None

    return reason


def _without_cuda_extension(package: str) -> None:
    """Let the Triton parts of a package import where its compiled extension, which it wants first, is absent."""
    if package in sys.modules:
        return
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        return
    try:
        importlib.import_module(package)
    except Exception:
        stub = types.ModuleType(package)
        stub.__path__ = list(found.submodule_search_locations)
        sys.modules[package] = stub


def expanded(t: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Repeat KV heads [B, N, G, …] (or their dimension ``dim``) for every query head."""
    return t.repeat_interleave(heads // t.shape[dim], dim=dim) if t.shape[dim] != heads else t
