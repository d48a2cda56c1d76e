"""Peak memory is that of the tensors that live at a time, above what lived before."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.bench.measure import (
    copies_beyond_cache,
    copy_rate,
    lap_seconds,
    matmul_rate,
    median_seconds,
    peak_bytes,
)

CPU = torch.device("cpu")
MIB = 2**20


def mebibytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_memory_that_is_released_counts_once() -> None:
    def run() -> None:
        first = mebibytes(4)
        del first
        second, third = mebibytes(8), mebibytes(2)
        assert len(second) > len(third)

    assert 10 * MIB <= peak_bytes(run, CPU) < 10.1 * MIB


def test_what_was_there_before_does_not_count() -> None:
    held = [mebibytes(16)]

    def run() -> None:
        held.append(mebibytes(1))
        held.pop(0)

    assert MIB <= peak_bytes(run, CPU) < 1.1 * MIB


def test_scratch_space_inside_a_kernel_counts() -> None:
    q = torch.randn(1, 1, 1024, 8)
    mask = torch.ones(1024, 1024, dtype=torch.bool)

    def masked() -> None:
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert peak_bytes(masked, CPU) >= 1024 * 1024 * 4  # the mask, as floats


def test_warm_up_runs_come_before_the_timed_ones() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), CPU, warmup=2, repeats=3) > 0
    assert len(calls) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_of_a_matmul_is_a_rate(dtype: torch.dtype) -> None:
    assert matmul_rate(dtype, CPU, size=64) > 1e6


def test_a_lap_runs_everything_once() -> None:
    calls: list[str] = []
    runs = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert lap_seconds(runs, CPU, warmup=1, repeats=2) > 0
    assert calls == ["a", "b"] * 3


def test_the_rate_of_a_copy_is_a_rate() -> None:
    assert copy_rate(CPU, size=2**20) > 1e6


def test_processors_need_no_copies_beyond_the_cache() -> None:
    assert copies_beyond_cache(1, CPU) == 1
