"""What the Triton backends of all ops share: where they run, and what the chip offers them.

A Triton backend needs no GPU where ``TRITON_INTERPRET=1`` is set before triton is first imported; it is then
interpreted, far too slowly for anything but tests, and so runs only when asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KiB of shared memory that one program can have, by compute capability."""


def interpreting() -> bool:
    """Return whether kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Return why no kernel can run on this machine, or None."""
    if not INSTALLED:
        return "triton is not installed; pip install 'linmu[triton]'"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def hesitates() -> str | None:
    """Return why kernels are not chosen unless asked for, or None."""
    return "its kernels are interpreted, for tests" if interpreting() else None


def off_device(*tensors: Tensor | None) -> str | None:
    """Return why kernels cannot read these tensors, or None: they stand elsewhere, or in an unfit type."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cuda" and not interpreting():
            return f"a tensor is on {t.device}, not on a CUDA device"
        if t.is_floating_point() and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a tensor is {t.dtype}; kernels take float32, bfloat16 and float16"
    return None


def dot_type(dtype: torch.dtype) -> Any:
    """Return Triton's type of the operands of matrix products; interpreted, those of bf16 are wrong."""
    import triton.language as tl

    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if interpreting() else narrow.get(dtype, tl.float32)


def on_device(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device where ``t`` stands."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 227 * 1024
    return _shared_memory(device.index if device.index is not None else torch.cuda.current_device())


def roomy(device: torch.device) -> bool:
    """Return whether one program can have about as much shared memory as on Hopper, so that tiles may be large."""
    return shared_memory(device) >= 200 * 1024


@functools.cache
def _shared_memory(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    known = SHARED_MEMORY.get((properties.major, properties.minor), 99) * 1024
    return getattr(properties, "shared_memory_per_block_optin", known)
