"""The benchmark of ops refuses to time what is wrong, on every op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from recipes.bench.ops import CASES, CheckFailedError, UnknownBenchmarkError, check, growth, measure_ops

CPU = torch.device("cpu")
LENGTHS = (96, 160)


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Callable[[Any], Any]], None]]:
    """Give an op a backend that spoils what the reference returns."""
    ops = []

    def add(name: str, spoil: Callable[[Any], Any]) -> None:
        op = CASES[name].op
        op.backend("broken")(lambda *args, **kwargs: spoil(op.backends["reference"].run(*args, **kwargs)))
        ops.append(op)

    yield add
    for op in ops:
        del op.backends["broken"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_agrees_with_the_dense_form(name: str, dtype: torch.dtype) -> None:
    assert 0 <= check(name, "reference", dtype, CPU) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * (1 + 1e-3),
        lambda y: y.roll(1, dims=1),
        lambda y: torch.where(torch.arange(y.shape[1]).view(1, -1, *[1] * (y.ndim - 2)) == 20, 0, y),
        lambda y: y / 0,
    ],
    ids=["scaled", "shifted", "one token lost", "not finite"],
)
def test_a_wrong_backend_gets_no_speed(name: str, spoil: Callable, broken: Callable) -> None:
    broken(name, lambda out: (spoil(out[0]), out[1]) if isinstance(out, tuple) else spoil(out))
    with pytest.raises(CheckFailedError, match=f"{name} on broken"):
        measure_ops([name], LENGTHS, repeats=1)


@pytest.mark.parametrize("argument", [3, 4], ids=["forward", "backward"])
def test_the_check_sees_each_direction_of_the_scan(argument: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = CASES["ssd"].op
    reference = op.backends["reference"].run

    def other_decay(*args: Any, **kwargs: Any) -> Any:
        log_a, dt = args[argument]
        return reference(*args[:argument], (1.1 * log_a, dt), *args[argument + 1 :], **kwargs)

    monkeypatch.setitem(
        op.backends,
        "reference",
        type(op.backends["reference"])("reference", other_decay, lambda: None, lambda *a, **k: None),
    )
    with pytest.raises(CheckFailedError):
        check("ssd", "reference", torch.float32, CPU)


def test_rows_and_growth_are_of_every_op_and_length() -> None:
    told: list[int] = []
    rows = measure_ops(None, LENGTHS, repeats=1, progress=lambda _, tokens: told.append(tokens))
    assert [(row["op"], row["tokens"]) for row in rows] == [(n, length) for n in CASES for length in LENGTHS]
    assert told == list(LENGTHS) * len(CASES)
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 and row["error"] < 1e-5 for row in rows)
    assert set(growth(rows)) == {f"{name}_growth" for name in CASES}


def test_growth_is_cost_a_token_at_the_last_length_over_that_at_the_first() -> None:
    rows = [
        {"op": "ssd", "backend": backend, "tokens": n, "ns_per_token": cost}
        for backend, costs in (("reference", (4.0, 5.0, 6.0)), ("triton", (2.0, 2.0, 2.0)))
        for n, cost in zip((8, 16, 32), costs)
    ]
    found = growth(rows)
    assert set(found) == {"ssd_growth", "ssd_triton_growth"}
    assert math.isclose(found["ssd_growth"], 1.5)
    assert math.isclose(found["ssd_triton_growth"], 1.0)


def test_an_unknown_op_is_refused_with_near_names_before_anything_runs() -> None:
    with pytest.raises(UnknownBenchmarkError, match="Did you mean 'windows'"):
        measure_ops(["ssd", "window"], LENGTHS, progress=lambda *_: pytest.fail("something ran"))
