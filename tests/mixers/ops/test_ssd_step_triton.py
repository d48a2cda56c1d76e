"""The one-token step's kernel against the reference in fp64: outputs and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import BackendError
from mixers.ops import ssd_step, triton_support
from tests.helpers import assert_close
from tests.mixers.ops.test_ssd_step import DEVICE, draw, exactly

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(given: dict[str, Any], tolerance: float) -> None:
    exact = exactly(given)
    want = ssd_step(**exact, backend="reference")
    assert_close("y", want, ssd_step(**given, backend="triton"), tolerance)
    assert_close("state", exact["state"], given["state"], 1e-6)


@settings(max_examples=15)
@given(
    heads=st.sampled_from([(4, 2), (3, 3), (7, 1)]),
    per_head=st.booleans(),
    sizes=st.sampled_from([(16, 32), (24, 20), (200, 64)]),
    denominator=st.booleans(),
    without=st.sets(st.sampled_from(["skip", "norm_weight", "gate"])),
)
def test_kernel_equals_the_reference(
    heads: tuple[int, int], per_head: bool, sizes: tuple[int, int], denominator: bool, without: set[str]
) -> None:
    given = draw(2, heads, per_head, sizes, denominator)
    check({**given, **dict.fromkeys(without)}, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(draw(2, (4, 2), False, (32, 16), True, dtype), 2e-2 if rounded else TOLERANCE[dtype])


def test_many_steps_do_not_drift() -> None:
    given = draw(1, (4, 2), False, (16, 16), True)
    exact = exactly(given)
    for _ in range(20):
        y, want = ssd_step(**given, backend="triton"), ssd_step(**exact)
    assert_close("y", want, y, 1e-5)
    assert_close("state", exact["state"], given["state"], 1e-5)


def test_rows_of_a_state_may_be_apart() -> None:
    given = draw(2, (4, 2), False, (16, 16), True)
    apart = torch.zeros(2, 2, 16, 20, device=DEVICE)
    given["state"] = apart[..., :17].copy_(given["state"])
    check(given, 1e-5)
    assert not apart[..., 17:].any()


def test_refuses_a_state_that_is_not_fp32() -> None:
    given = draw(1, (4, 2), False, (8, 8), False)
    with pytest.raises(BackendError, match="float32 state"):
        ssd_step(**{**given, "state": given["state"].bfloat16()}, backend="triton")


def test_compiles_without_a_break() -> None:
    given, other = (draw(1, (4, 2), False, (8, 8), True) for _ in range(2))

    def run(**arguments: Any) -> Tensor:
        return ssd_step(**arguments, backend="triton").sin()

    want = run(**given)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(**other)
    assert_close("y", want, found, 1e-6)
    assert_close("state", given["state"], other["state"], 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(128, 128), (256, 128), (192, 96), (64, 32)])
@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_at_size(dtype: torch.dtype, sizes: tuple[int, int], denominator: bool, per_head: bool) -> None:
    check(draw(64, (28, 4), per_head, sizes, denominator, dtype), TOLERANCE[dtype])


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    given = draw(8, (28, 4), False, (128, 128), True)
    exact, start = exactly(given), given["state"].clone()
    ssd_step(**given, backend="triton")  # compiles
    given["state"].copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd_step(**given, backend="triton")
    given["state"].copy_(start)
    for _ in range(3):
        graph.replay()
        want = ssd_step(**exact)
    assert_close("y", want, y, 1e-5)
    assert_close("state", exact["state"], given["state"], 1e-5)
