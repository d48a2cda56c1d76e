"""The benchmark of ops refuses to time what is wrong, on every op, and says what it left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from recipes.bench import ops as bench
from recipes.bench.cases import CASES, SHAPES
from recipes.bench.checks import CheckFailedError, check, check_problem
from recipes.bench.ops import UnknownBenchmarkError, growth, measure_ops
from recipes.bench.peers import PEERS, peers_of
from recipes.bench.peers.peer import Peer
from recipes.bench.roofline import Ceilings, forward_work, training_work

CPU = torch.device("cpu")
LENGTHS = (96, 160)
SMALL = SHAPES["small"]
OPS = ["ssd", "ssd_causal", "windows", "text_window", "short_conv"]
CEILINGS = Ceilings(bytes_per_second=1e9, operations_per_second=1e12)


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


def on_output(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda out: (spoil(out[0]), out[1]) if isinstance(out, tuple) else spoil(out)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 1.001 * gradients[0]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * (1 + 1e-3),
        lambda y: torch.where(torch.arange(y.shape[1]).view(1, -1, *[1] * (y.ndim - 2)) == 20, 0, y),
        lambda y: y / 0,
    ],
    ids=["scaled", "one token lost", "not finite"],
)
def test_a_wrong_backend_gets_no_speed(name: str, spoil: Callable, broken: Callable) -> None:
    broken(name, on_output(spoil))
    with pytest.raises(CheckFailedError, match=f"{name} on broken: its result"):
        measure_ops([name], LENGTHS, repeats=1, peers_to=0)


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_gradient_gets_no_speed_where_training_is_measured(name: str, broken: Callable) -> None:
    broken(name, on_output(WrongGradient.apply))
    with pytest.raises(CheckFailedError, match=f"{name} on broken: its gradient of "):
        measure_ops([name], LENGTHS[:1], repeats=1, backward=True, peers_to=0)
    assert measure_ops([name], LENGTHS[:1], repeats=1, backward=False, peers_to=0)


@pytest.mark.parametrize("argument", [3, 4], ids=["forward", "backward"])
def test_the_check_sees_each_direction_of_the_scan(argument: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = CASES["ssd"].op
    reference = op.backends["reference"]

    def other_decay(*args: Any, **kwargs: Any) -> Any:
        log_a, dt = args[argument]
        return reference.run(*args[:argument], (1.1 * log_a, dt), *args[argument + 1 :], **kwargs)

    monkeypatch.setitem(op.backends, "reference", dataclasses.replace(reference, run=other_decay))
    with pytest.raises(CheckFailedError):
        check("ssd", "reference", check_problem(CASES["ssd"], SMALL, torch.float32, CPU))


def test_rows_are_of_every_op_and_of_every_peer() -> None:
    told: list[int] = []
    rows = measure_ops(
        None,
        LENGTHS[:1],
        ceilings=CEILINGS,
        backward=True,
        repeats=1,
        progress=lambda _, tokens: told.append(tokens),
    )
    ours = [row for row in rows if row["kind"] == "ours" and row["by"] == "reference"]
    expected = [
        (n, t) for n, c in CASES.items() for t in ((SMALL.batch,) if c.row == "batch" else LENGTHS[:1])
    ]
    assert [(row["op"], row["tokens"]) for row in ours] == expected
    assert set(told) == {0, SMALL.batch, LENGTHS[0]}
    for row in ours:
        assert row["fwd_ms"] > 0
        assert row["error"] < 1e-5
        assert row["bytes_ms"] > 0
        assert (row["fwd_bwd_ms"] is None) == (row["op"] == "step")
        if row["fwd_bwd_ms"] is not None:
            assert row["fwd_bwd_ms"] > 0
            assert row["gradient_error"] < 1e-5
            assert row["fwd_bwd_limit_ms"] > row["bytes_ms"]
            assert row["fwd_bwd_peak_mib"] > 0
    others = [(row["op"], row["by"]) for row in rows if row["kind"] in ("peer", "another")]
    assert others == [(name, peer.name) for name in CASES for peer in peers_of(name)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why there is no CUDA device")
def test_absent_peers_say_why() -> None:
    rows = measure_ops(["ssd"], LENGTHS[:1], repeats=1)
    absent = [row for row in rows if row["kind"] != "ours"]
    assert {row["by"] for row in absent} == {peer.name for peer in PEERS if "ssd" in peer.cases}
    assert all(row["note"] == "there is no CUDA device" and row["tokens"] is None for row in absent)


def doubled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda x, weight: factor * CASES["short_conv"].op(x, weight, backend="reference")


def refuses_backward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("produces incorrect results\non this chip")
    return doubled(1)(x, weight)


@pytest.mark.parametrize(
    ("run", "timed", "note"),
    [
        (doubled(1), {"fwd_ms", "fwd_bwd_ms"}, None),
        (doubled(1.2), set(), "wrong by 0.2 relative RMS"),
        (
            lambda x, weight: WrongBy2.apply(doubled(1)(x, weight)),
            {"fwd_ms"},
            "no backward: wrong by 1 relative RMS",
        ),
        (refuses_backward, {"fwd_ms"}, "no backward: RuntimeError: produces incorrect results"),
        (lambda x, weight: x.no_such_method(), set(), "'Tensor' object has no attribute"),
    ],
    ids=["right", "wrong", "wrong gradients", "no gradients", "raises"],
)
def test_a_peer_is_timed_as_far_as_it_is_right(
    run: Callable, timed: set, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer("them", ("short_conv",), lambda: None, lambda inputs, problem: inputs.args, run, doubled(1))
    monkeypatch.setattr(bench, "peers_of", lambda name: [peer])
    rows = measure_ops(["short_conv"], LENGTHS, repeats=1, backward=True)
    theirs = [row for row in rows if row["by"] == "them"]
    assert {key for row in theirs for key in ("fwd_ms", "fwd_bwd_ms") if row.get(key)} == timed
    assert [row["tokens"] for row in theirs] == (list(LENGTHS) if timed else [None])
    for row in theirs:
        assert row["note"] is None if note is None else note in row["note"]


class WrongBy2(WrongGradient):
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0]


def test_a_backend_that_raises_says_so_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    op = CASES["short_conv"].op
    reference = op.backends["reference"]

    def short_rows(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape[1] == LENGTHS[1]:
            raise RuntimeError("too long for it\nreally")
        return reference.run(x, *args, **kwargs)

    def never(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError("not today")

    for name, run in (("short", short_rows), ("never", never)):
        monkeypatch.setitem(op.backends, name, dataclasses.replace(reference, name=name, run=run))
    rows = measure_ops(["short_conv"], LENGTHS, repeats=1, peers_to=0)
    said = {(row["by"], row["tokens"]): (row.get("fwd_ms") is not None, row["note"]) for row in rows}
    assert said["never", None] == (False, "ValueError: not today")
    assert said["short", LENGTHS[0]] == (True, None)
    assert said["short", LENGTHS[1]] == (False, "RuntimeError: too long for it")
    assert said["reference", LENGTHS[1]] == (True, None)


def test_lengths_that_would_take_too_long_are_left_out() -> None:
    rows = measure_ops(["short_conv"], LENGTHS, repeats=1, max_seconds=1e-9, peers_to=0)
    assert [row["note"] for row in rows if row["by"] == "reference"] == [None, "would take too long"]
    assert rows[1]["fwd_ms"] is None


def test_peers_are_given_no_longer_rows_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(
        "them", ("short_conv",), lambda: None, lambda inputs, problem: inputs.args, doubled(1), doubled(1)
    )
    monkeypatch.setattr(bench, "peers_of", lambda name: [peer])
    rows = measure_ops(["short_conv"], LENGTHS, repeats=1, peers_to=LENGTHS[0])
    assert [row["tokens"] for row in rows if row["by"] == "them"] == [LENGTHS[0]]


def test_growth_is_cost_a_token_at_the_last_length_over_that_at_the_first() -> None:
    rows = [
        {"op": "ssd", "by": by, "kind": kind, "tokens": n, "ns_per_token": cost}
        for by, kind, costs in (
            ("reference", "ours", (4.0, 5.0, 6.0)),
            ("triton", "ours", (2.0, 2.0, 2.0)),
            ("them", "peer", (2.0, 2.0, 3.0)),
        )
        for n, cost in zip((8, 16, 32), costs)
    ]
    found = growth(rows)
    assert set(found) == {"ssd_growth", "ssd_triton_growth"}
    assert math.isclose(found["ssd_growth"], 1.5)
    assert math.isclose(found["ssd_triton_growth"], 1.0)


def test_an_unknown_op_is_refused_with_near_names_before_anything_runs() -> None:
    with pytest.raises(UnknownBenchmarkError, match="Did you mean 'windows'"):
        measure_ops(["ssd", "window"], LENGTHS, progress=lambda *_: pytest.fail("something ran"))


def test_the_limits_count_what_must_move_and_multiply() -> None:
    """By hand, at 7B shapes in bf16: 131,072 tokens, 28 and 4 heads of 128, state 128."""
    large = dataclasses.replace(SHAPES["7b"], text=0)
    case, tokens = CASES["ssd"], 131072
    layout = dataclasses.make_dataclass("Row", [("length", int), ("batch_size", int)])(tokens, 1)
    problem = bench.Problem(large, layout, torch.bfloat16)  # type: ignore[arg-type]
    within = 28 * 2 * 64 * (128 + 128)
    states = 2 * (28 + 4) * 2 * 128 * 128
    assert case.products(problem) == tokens * (within + states)
    one_way = CASES["ssd_causal"].products(problem)
    assert one_way == tokens * (within / 2 + states / 2)
    step = CASES["step"]
    problem = bench.Problem(SMALL, step.layout(SMALL, 1, CPU), torch.float32)
    inputs = step.make(problem)
    state = inputs.args[4].numel() * 4
    y = torch.empty(8, 4, 64)
    work = forward_work(step, problem, inputs, y)
    assert 2 * state < work.bytes < 2.3 * state
    assert work.seconds(CEILINGS) == (work.bytes / 1e9, work.operations / 1e12)
    conv = CASES["short_conv"]
    inputs = conv.make(bench.Problem(SMALL, conv.layout(SMALL, 96, CPU), torch.float32))
    x = inputs.args[0]
    forward = forward_work(conv, problem, inputs, x).bytes
    assert forward == 4 * (2 * x.numel() + inputs.args[1].numel())
    assert training_work(conv, problem, inputs, x).bytes == 4 * (5 * x.numel() + 3 * inputs.args[1].numel())
