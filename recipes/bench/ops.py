"""The ops behind the mixers: time and memory at growing length, on every backend that runs here.

No speed is reported of a backend that does not agree with the dense form of the op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers import TokenLayout
from mixers.errors import near
from mixers.ops import block_attention, short_conv, ssd
from mixers.ops.dispatch import Op
from recipes.bench.measure import median_seconds, peak_bytes
from recipes.bench.oracles import dense_attention, dense_conv, dense_ssd
from recipes.errors import RecipeError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TEXT, FRAME = 16, (8, 8)
CHECKED_FRAMES = 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest RMS error relative to the RMS of the dense form in fp64 on the same inputs, by dtype."""


class CheckFailedError(RecipeError, RuntimeError):
    """An op disagrees with its dense form, so its speed means nothing."""


class UnknownBenchmarkError(RecipeError, LookupError):
    """No op is benchmarked under that name."""


@dataclass(frozen=True)
class Case:
    """An op at one setting.

    Attributes:
        op: What is measured.
        arguments: From a layout, a dtype and a device to the op's positional and keyword arguments.
        dense: Its O(N²) form, called with the same arguments.
    """

    op: Op
    arguments: Callable[[TokenLayout, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
    dense: Callable[..., Tensor]


def measure_ops(
    names: Sequence[str] | None = None,
    lengths: Sequence[int] = (8192, 16384, 32768, 65536),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 3,
    progress: Callable[[str, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Check each op against its dense form, then measure its forward at growing length.

    Inputs are one row of text, a video of 8×8-token frames, and text, with 4 heads of width 64 on 2 KV heads.

    Args:
        names: Keys of :data:`CASES`. Default: all.
        lengths: Tokens of the row, rising.
        dtype: Of the inputs.
        device: Where to run.
        repeats: Timed runs, of which the median counts.
        progress: Told (op on backend, tokens) before each measurement.

    Returns:
        A row an op, backend and length: ``op``, ``backend``, ``tokens``, ``ms``, ``ns_per_token``,
        ``peak_mib`` (above the inputs) and ``error``, that of the check.

    Raises:
        CheckFailedError: A backend's error is above :data:`TOLERANCE`.
        UnknownBenchmarkError: A name is no case; near names are given.
    """
    for name in names or ():
        if name not in CASES:
            raise UnknownBenchmarkError(
                f"no op is benchmarked as {name!r}.{near(name, CASES)} There are: {', '.join(CASES)}."
            )
    device, rows = torch.device(device), []
    for name in names or CASES:
        case = CASES[name]
        for backend in case.op.backends.values():
            if backend.unavailable() is not None:
                continue
            error = check(name, backend.name, dtype, device)
            for length in lengths:
                if progress is not None:
                    progress(f"{name} on {backend.name}", length)
                args, kwargs = case.arguments(video_layout(length, device), dtype)

                def run(
                    op: Op = case.op, backend: str = backend.name, args: Any = args, kwargs: Any = kwargs
                ) -> None:
                    with torch.no_grad():
                        op(*args, **kwargs, backend=backend)

                peak = peak_bytes(run, device)
                seconds = median_seconds(run, device, warmup=0, repeats=repeats)
                rows.append(
                    {
                        "op": name,
                        "backend": backend.name,
                        "tokens": length,
                        "ms": 1e3 * seconds,
                        "ns_per_token": 1e9 * seconds / length,
                        "peak_mib": peak / 2**20,
                        "error": error,
                    }
                )
    return rows


def check(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Return the RMS error of a backend relative to the op's dense form in fp64.

    Raises:
        CheckFailedError: It is above :data:`TOLERANCE`, or not a number.
    """
    case = CASES[name]
    layout = video_layout(2 * TEXT + CHECKED_FRAMES * FRAME[0] * FRAME[1], device)
    args, kwargs = case.arguments(layout, dtype)
    found = case.op(*args, **kwargs, backend=backend)
    found = (found[0] if isinstance(found, tuple) else found).double()
    expected = case.dense(*_in_fp64(args), **_in_fp64(kwargs))
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not error <= TOLERANCE[dtype]:
        raise CheckFailedError(
            f"{name} on {backend} is off by {error:.2g} relative RMS in {dtype}, more than "
            f"{TOLERANCE[dtype]:.2g}: no speed is reported of a wrong result."
        )
    return error


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by how much more than linearly the time of each op grows from its first length to its last.

    1 is linear; named ``<op>_growth``, or ``<op>_<backend>_growth`` but for the reference.
    """
    found = {}
    for (op, backend), group in itertools.groupby(rows, key=lambda row: (row["op"], row["backend"])):
        costs = [row["ns_per_token"] for row in group]
        name = op if backend == "reference" else f"{op}_{backend}"
        found[f"{name}_growth"] = costs[-1] / costs[0]
    return found


def video_layout(length: int, device: torch.device) -> TokenLayout:
    """One row: text, one video of whole 8×8-token frames, text for what is left."""
    frames = (length - 2 * TEXT) // (FRAME[0] * FRAME[1])
    return TokenLayout.from_grids(length, [[(TEXT, (frames, *FRAME))]], device=device)


def _random(layout: TokenLayout, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, layout.length, *shape, generator=generator).to(layout.device, dtype)


def _qkv(layout: TokenLayout, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = _random(layout, dtype, HEADS + 2 * KV_HEADS, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    return [q.contiguous(), k.contiguous(), v.contiguous()]


def _decay(layout: TokenLayout, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    log_a, dt = F.softplus(_random(layout, dtype, 2, KV_HEADS, seed=seed) - 2).unbind(2)
    return -log_a, dt


def _ssd(layout: TokenLayout, dtype: torch.dtype, both: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v = _qkv(layout, dtype)
    backward_decay = _decay(layout, dtype, seed=2) if both else None
    arguments = (q.softmax(-1), k.softmax(-1), v, _decay(layout, dtype, seed=1), backward_decay)
    return arguments, {"scan": layout.scan("wht"), "denominator": True}


def _windows(layout: TokenLayout, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*_qkv(layout, dtype), layout.windows((4, 4, 4), shifted=True)), {"scale": HEAD_DIM**-0.5}


def _recent(layout: TokenLayout, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*_qkv(layout, dtype), layout.recent(128, text_only=False)), {"scale": HEAD_DIM**-0.5}


def _conv(layout: TokenLayout, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = _random(layout, dtype, HEADS * HEAD_DIM)
    return (x, x[0, :4].T.contiguous()), {"scan": layout.scan("wht")}


def _in_fp64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(_in_fp64(part) for part in value)
    return {key: _in_fp64(part) for key, part in value.items()} if isinstance(value, dict) else value


CASES: dict[str, Case] = {
    "ssd_causal": Case(ssd, lambda layout, dtype: _ssd(layout, dtype, both=False), dense_ssd),
    "ssd": Case(ssd, lambda layout, dtype: _ssd(layout, dtype, both=True), dense_ssd),
    "windows": Case(block_attention, _windows, dense_attention),
    "text_window": Case(block_attention, _recent, dense_attention),
    "short_conv": Case(short_conv, _conv, dense_conv),
}
"""What is measured, by name. ``ssd`` is both directions of the masked scan, ``ssd_causal`` one of them."""
