"""Decay and step size: their range, their start, and that their rates stay fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mixers.decay import INITIAL_DT, MEMORY_TOKENS, Decay


@pytest.mark.parametrize("heads", [1, 2, 7])
@pytest.mark.parametrize("bounds", [MEMORY_TOKENS, (300.0, 20000.0)])
def test_memories_start_spread_between_the_bounds(heads: int, bounds: tuple[float, float]) -> None:
    decay = Decay(16, heads, bounds)
    decay.proj.weight.data.zero_()
    log_a, dt = decay(torch.zeros(1, 1, 16))
    memory = -1 / log_a[0, 0]
    torch.testing.assert_close(dt, torch.full_like(dt, INITIAL_DT))
    if heads > 1:
        torch.testing.assert_close(memory[[0, -1]], torch.tensor(bounds, dtype=torch.float32))
        steps = memory.log().diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-4, atol=1e-4)
    assert ((memory >= bounds[0] * 0.999) & (memory <= bounds[1] * 1.001)).all()


def test_signs() -> None:
    log_a, dt = Decay(16, 3)(50 * torch.randn(2, 100, 16))
    assert (log_a <= 0).all()
    assert (dt >= 0).all()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.float16, non_blocking=True),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
        lambda m: m.to("meta", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rates_stay_fp32(cast: Callable[[nn.Module], nn.Module], device: str) -> None:
    with torch.device(device):
        decay = Decay(16, 3)
    before = decay.rates.A_log.detach().clone()
    decay = cast(decay)
    assert decay.proj.weight.dtype in (torch.bfloat16, torch.float16)
    assert decay.rates.A_log.dtype == decay.rates.dt_bias.dtype == torch.float32
    if decay.rates.A_log.device.type == "cpu":
        assert torch.equal(decay.rates.A_log, before)
        log_a, dt = decay(torch.randn(1, 4, 16, dtype=decay.proj.weight.dtype))
        assert log_a.dtype == dt.dtype == torch.float32


def test_rates_follow_to_fp64() -> None:
    decay = Decay(16, 3).double()
    assert decay.rates.A_log.dtype == torch.float64
    assert decay(torch.randn(1, 4, 16).double())[0].dtype == torch.float64


def test_the_default_dtype_does_not_round_the_rates() -> None:
    want = Decay(16, 7).rates.A_log
    torch.set_default_dtype(torch.bfloat16)
    try:
        narrow = Decay(16, 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert narrow.proj.weight.dtype == torch.bfloat16
    assert torch.equal(narrow.rates.A_log, want)


def test_meta_to_memory() -> None:
    with torch.device("meta"):
        decay = Decay(16, 3).to(torch.bfloat16)
    decay.to_empty(device="cpu")
    assert decay.rates.A_log.device.type == "cpu"
    assert decay.rates.A_log.dtype == torch.float32
    decay.load_state_dict(Decay(16, 3).state_dict())


def test_copies_share_nothing() -> None:
    decay = Decay(16, 3)
    other = copy.deepcopy(decay)
    other.rates.A_log.data.zero_()
    assert decay.rates.A_log.any()
