"""The check itself: the forms it compares with, the rows that it draws, and that it misses nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mixers import BackendError
from recipes.bench.cases import CASES, SHAPES, Inputs, Problem, tensors
from recipes.bench.checks import (
    TOLERANCE,
    Errors,
    check,
    check_problem,
    check_table,
    compare,
    contenders,
    errors_of,
    layouts,
    relative_rms,
)

CPU = torch.device("cpu")
SMALL = SHAPES["small"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dense is not None])
def test_the_reference_agrees_with_the_dense_form(name: str, dtype: torch.dtype) -> None:
    errors = check(name, "reference", check_problem(CASES[name], SMALL, dtype, CPU))
    assert 0 <= errors.largest < (1e-12 if dtype == torch.float64 else 1e-5)
    assert errors.gradient is not None
    assert errors.worst in CASES[name].names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_narrow_types_stay_within_their_tolerance(name: str, dtype: torch.dtype) -> None:
    errors = check(name, "reference", check_problem(CASES[name], SMALL, dtype, CPU))
    assert 1e-5 < errors.largest <= TOLERANCE[dtype]


def test_rows_are_hard_in_one_way_each() -> None:
    rows = layouts(300)
    assert rows["text"].clip is None
    giant = rows["one clip"]
    assert giant.vision is not None
    assert bool(giant.vision.all())
    tiny = rows["tiny clips"]
    assert tiny.clip is not None
    assert len(tiny.clip.unique()) > 50
    padded = rows["padded"]
    assert padded.valid is not None
    assert (bool(padded.valid[0, 0]), bool(padded.valid[1, -1])) == (False, False)
    packed = rows["packed"]
    assert packed.sequence is not None
    assert packed.sequence.unique(return_counts=True)[1].min() == 1
    for length in (64, 300, 2048):
        for row in layouts(length).values():
            assert length * 0.8 <= row.length <= length + 5


def test_the_table_has_a_row_a_kind_dtype_and_length() -> None:
    told: list[str] = []
    rows = check_table(
        ["ssd", "windows", "step"], SMALL, (100, 300), progress=lambda what, _: told.append(what)
    )
    assert all(row["right"] and row["table"] == "check" for row in rows)
    kinds = [(row["row"], row["decay"], row["tokens"]) for row in rows if row["op"] == "ssd"]
    assert len(kinds) == len(set(kinds))
    assert {kind for kind, _, _ in kinds} == {*layouts(100), "video"}
    assert {decay for _, decay, _ in kinds} == {"usual", "gone", "kept"}
    assert 300 in {tokens for _, _, tokens in kinds}
    assert "text" not in {row["row"] for row in rows if row["op"] == "windows"}
    assert [row["gradient_error"] for row in rows if row["op"] == "step"] == [None] * 3
    assert len(told) == len(rows)


def test_the_table_holds_what_is_wrong_and_what_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    op = CASES["short_conv"].op
    reference = op.backends["reference"]

    def wrong(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape[0] == 2:
            raise ValueError("no batches\nplease")
        return reference.run(x, *args, **kwargs) / 0

    monkeypatch.setitem(op.backends, "wrong", dataclasses.replace(reference, name="wrong", run=wrong))
    rows = check_table(["short_conv"], SMALL, (100,), backends=["wrong"])
    assert not any(row["right"] for row in rows)
    assert {row["note"] for row in rows} == {None, "ValueError: no batches"}
    assert {row["error"] for row in rows} == {None}


def test_what_a_backend_does_not_take_is_neither_right_nor_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    op = CASES["short_conv"].op
    reference = op.backends["reference"]

    def picky(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape[0] == 2:
            raise BackendError("it takes one row")
        return reference.run(x, *args, **kwargs)

    monkeypatch.setitem(op.backends, "picky", dataclasses.replace(reference, name="picky", run=picky))
    rows = check_table(["short_conv"], SMALL, (100,), backends=["picky"])
    assert {(row["row"], row["right"]) for row in rows if row["note"]} == {("padded", None)}
    assert all(row["right"] for row in rows if not row["note"])


def test_outputs_at_padding_do_not_count() -> None:
    problem = Problem(SMALL, layouts(100)["padded"], torch.float32)
    valid = problem.layout.valid
    assert valid is not None
    inputs = CASES["short_conv"].make(problem)
    op = CASES["short_conv"].op

    def elsewhere(x: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.where(valid[..., None], op(x, weight, **kwargs, backend="reference"), 7.0)

    def plain(*args: Any, **kwargs: Any) -> torch.Tensor:
        return op(*args, **kwargs, backend="reference")

    assert compare(elsewhere, plain, inputs, valid=valid).largest < 1e-6
    assert compare(elsewhere, plain, inputs).largest > 1e-2


def test_every_gradient_and_the_state_in_place_count() -> None:
    a, b = torch.randn(2, 3, 5, requires_grad=False).unbind()
    for forgotten in range(2):

        def run(*args: torch.Tensor, lost: int = forgotten) -> torch.Tensor:
            parts = [t.detach() if place == lost else t for place, t in enumerate(args)]
            return parts[0] * parts[1]

        errors = compare(run, lambda a, b: a * b, Inputs((a, b), {}), ("a", "b"))
        assert (errors.gradient, errors.worst) == (1.0, "ab"[forgotten])
    step = check_problem(CASES["step"], SMALL, torch.float32, CPU)
    reference = CASES["step"].op.backends["reference"].run

    def keeps_the_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return reference(*args[:4], args[4].clone(), **kwargs)

    inputs = CASES["step"].make(step)
    assert compare(reference, reference, inputs, state=4, gradients=False).largest < 1e-6
    assert compare(keeps_the_state, reference, inputs, state=4, gradients=False).largest > 0.01


def test_arguments_are_left_as_they_were() -> None:
    for name in ("step", "mmate"):
        problem = check_problem(CASES[name], SMALL, torch.float32, CPU)
        inputs = CASES[name].make(problem)
        before = [t.detach().clone() for t in tensors(inputs.args)]
        errors_of(name, "reference", problem)
        case = CASES[name]
        compare(
            lambda *a, c=case, **k: c.op(*a, **k, backend="reference"),
            lambda *a, c=case, **k: c.op(*a, **k, backend="reference"),
            inputs,
            state=case.state,
            gradients=case.state is None,
        )
        assert all(torch.equal(old, new) for old, new in zip(before, tensors(inputs.args)))


def test_relative_rms() -> None:
    assert relative_rms(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.1)
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_rms(torch.full((3,), 0.5), torch.zeros(3)) == 0.5
    assert Errors(0.1, 0.2).largest == 0.2
    assert not Errors(0.1, float("nan")).largest <= 1


def test_interpreted_kernels_are_no_contenders() -> None:
    assert {backend.name for backend in contenders(CASES["ssd"])} >= {"reference"}
    if not torch.cuda.is_available():
        assert [backend.name for backend in contenders(CASES["mmate"])] == ["reference"]
    assert [backend.name for backend in contenders(CASES["ssd"], ["reference"])] == ["reference"]
    assert list(contenders(CASES["ssd"], ["no-such-backend"])) == []
