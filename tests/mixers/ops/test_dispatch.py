"""Which backend runs, how it is told, and what is said when it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mixers
from mixers import BackendError
from mixers.ops import dispatch
from mixers.ops.dispatch import ENVIRONMENT_VARIABLE, Op


@pytest.fixture
def op() -> Iterator[Op]:
    """An op with a fast backend for even numbers, a plain one, and one that never runs here."""
    op = Op("test_op")
    op.backend("fast", unsupported=lambda n: "it is odd" if n % 2 else None)(lambda n: ("fast", n))
    op.backend("reference")(lambda n: ("reference", n))
    op.backend("triton", unavailable=lambda: "there is no GPU")(lambda n: ("triton", n))
    yield op
    del dispatch._OPS["test_op"]


def test_the_first_that_can_runs(op: Op) -> None:
    assert op(2) == ("fast", 2)
    assert op(3) == ("reference", 3)


def test_argument_beats_context_beats_environment(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert op(2) == ("reference", 2)
    with mixers.use_backend("fast"):
        assert op(2) == ("fast", 2)
        assert op(2, backend="reference") == ("reference", 2)
        with mixers.use_backend("reference"):
            assert op(2) == ("reference", 2)
        assert op(2) == ("fast", 2)
    assert op(2) == ("reference", 2)


def test_context_ends_when_its_block_fails(op: Op) -> None:
    with pytest.raises(ZeroDivisionError), mixers.use_backend("reference"):
        raise ZeroDivisionError
    assert op(2) == ("fast", 2)


def test_an_explicit_choice_never_falls_back(op: Op) -> None:
    with pytest.raises(BackendError, match="it is odd"):
        op(3, backend="fast")
    with mixers.use_backend("triton"), pytest.raises(BackendError, match="there is no GPU"):
        op(2)


def test_unknown_backends_list_near_names(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="Did you mean 'reference'"):
        op(2, backend="refrence")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        op(2)


def test_nothing_can_run(op: Op) -> None:
    del op.backends["reference"], op.backends["fast"]
    with pytest.raises(BackendError, match="there is no GPU"):
        op(2)
    assert mixers.backends()["test_op"].runs is None


def test_report(op: Op) -> None:
    report = mixers.backends()["test_op"]
    assert report.runs == "fast"
    assert report.reasons == {"reference": "fast comes first", "triton": "there is no GPU"}
    assert str(report) == "test_op: fast; not reference: fast comes first; not triton: there is no GPU"
    assert "test_op: fast\n    not reference: fast comes first\n    not triton: there is no GPU" in str(
        mixers.backends()
    )


def test_report_follows_what_was_told(op: Op) -> None:
    with mixers.use_backend("reference"):
        report = mixers.backends()["test_op"]
    assert report.runs == "reference"
    assert report.reasons["fast"] == "reference was asked for"


@pytest.mark.parametrize("told", ["triton", "cuda"])
def test_report_of_a_choice_that_cannot_run(op: Op, told: str) -> None:
    with mixers.use_backend(told):
        report = mixers.backends()["test_op"]
    assert report.runs is None
    assert report.reasons["reference"] == f"{told} was asked for"
    assert told in report.reasons


def test_every_op_reports_and_has_a_reference() -> None:
    reports = mixers.backends()
    assert {"ssd", "ssd_step", "short_conv", "block_attention"} <= reports.keys()
    for name, report in reports.items():
        assert report.runs == "reference" or report.runs is not None
        assert "reference" in dispatch._OPS[name].backends


def test_a_mixer_runs_on_the_backend_it_is_told() -> None:
    mixer = mixers.build("mmate", dim=16, num_heads=2)
    x = torch.randn(1, 5, 16)
    with mixers.use_backend("reference"):
        y = mixer(x)
    assert torch.equal(y, mixer(x))
    with mixers.use_backend("no-such-backend"), pytest.raises(BackendError):
        mixer(x)
