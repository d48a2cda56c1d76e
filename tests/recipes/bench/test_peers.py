"""What peers are asked to compute is what our ops compute: their arguments, their directions, their tables."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend

from recipes.bench import peers
from recipes.bench.cases import CASES, SHAPES, Problem
from recipes.bench.checks import check_problem, compare, relative_rms
from recipes.bench.peers import attention, scans
from recipes.bench.peers.peer import needs

CPU = torch.device("cpu")
SMALL = SHAPES["small"]
RIGHT = 1e-12


def problem_of(name: str, length: int = 224) -> Problem:
    return check_problem(CASES[name], SMALL, torch.float64, CPU, length)


def ours(name: str, problem: Problem) -> torch.Tensor:
    inputs = CASES[name].make(problem)
    y = CASES[name].op(*inputs.args, **inputs.kwargs, backend="reference")
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", ["ssd_raster", "ssd_head", "ssd_causal"])
@pytest.mark.parametrize("kind", ["mamba", "gla"])
def test_scans_in_two_passes_are_our_scan_and_the_step_itself_twice(name: str, kind: str) -> None:
    problem = problem_of(name)
    if name == "ssd_head":  # ours reads its clips in another order there
        inputs = CASES[name].make(problem)
        inputs.kwargs["scan"] = problem.layout.scan("thw")
        expected = CASES[name].op(*inputs.args, **inputs.kwargs, backend="reference")[0]
    else:
        inputs, expected = CASES[name].make(problem), ours(name, problem)
    if kind == "mamba":
        arguments, scan = scans.mamba_arguments(inputs, problem), scans._mamba_right
    else:
        arguments, scan = scans.gla_arguments(inputs, problem), scans._gla_right
    found = scans._directions(scan)(*arguments)
    c, b, x, _, backward = inputs.args
    if backward is not None:
        group = c.shape[2] // b.shape[2]
        b, x = (t.repeat_interleave(group, dim=2) for t in (b, x))
        dt = backward[1].repeat_interleave(c.shape[2] // backward[1].shape[2], dim=2)
        vision = problem.layout.vision
        assert vision is not None
        itself = (dt * (c * b).sum(-1) * vision[..., None])[..., None] * x
        expected = expected + itself
    assert relative_rms(found, expected) < RIGHT


def test_sharing_queries_is_another_function_and_said_so() -> None:
    problem = problem_of("ssd_causal")
    inputs = CASES["ssd_causal"].make(problem)
    arguments = scans.mamba_arguments(inputs, problem, SMALL.kv_heads)
    found = scans._directions(scans._mamba_right)(*arguments)
    expected = ours("ssd_causal", problem)
    same = slice(0, None, SMALL.heads // SMALL.kv_heads)
    assert relative_rms(found[:, :, same], expected[:, :, same]) < RIGHT
    assert relative_rms(found, expected) > 0.1
    shared = [peer for peer in peers.PEERS if "group" in peer.name]
    assert shared
    assert all(peer.another for peer in shared)


def test_windows_copied_together_by_size_are_our_windows() -> None:
    problem = problem_of("windows", 512)  # 8×8×8: shifted windows of 64, 32, 16 and 8 tokens
    inputs = CASES["windows"].make(problem)
    arguments = attention.window_arguments(inputs, problem)
    assert [size for size, _ in arguments[5]] == [8, 16, 32, 64]
    run = functools.partial(attention.partitioned, kernels=[SDPBackend.MATH])
    assert relative_rms(run(*arguments), ours("windows", problem)) < RIGHT
    tables = arguments[3:]
    expected = CASES["windows"].op
    errors = compare(
        lambda q, k, v: run(q, k, v, *tables),
        lambda q, k, v: expected(q, k, v, inputs.args[3], **inputs.kwargs, backend="reference"),
        type(inputs)(inputs.args[:3], {}),
    )
    assert errors.largest < RIGHT


def test_the_text_window_of_each_peer_is_ours() -> None:
    problem = problem_of("text_window", 300)
    inputs = CASES["text_window"].make(problem)
    expected = ours("text_window", problem)
    heads_first = attention._heads_first(inputs, problem)
    assert relative_rms(attention._sliding_right(*heads_first).transpose(1, 2), expected) < RIGHT
    packed = attention._varlen_right(*attention._varlen_arguments(inputs, problem))
    assert relative_rms(packed[None], expected) < RIGHT


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_arguments_prepared_for_it() -> None:
    problem = Problem(SMALL, CASES["text_window"].layout(SMALL, 256, CPU), torch.float32)
    arguments = attention._flex_arguments(CASES["text_window"].make(problem), problem)
    from torch.nn.attention.flex_attention import flex_attention

    with torch.no_grad():
        found = flex_attention(*arguments[:3], block_mask=arguments[3].value, enable_gqa=True)
    assert relative_rms(found, attention._sliding_right(*arguments)) < 1e-5


def test_the_step_of_a_head_each_is_ours() -> None:
    problem = problem_of("step")
    inputs = CASES["step"].make(problem)
    expected = CASES["step"].op(*inputs.args[:4], inputs.args[4].clone(), backend="reference")
    found = scans._step_right(*scans._step_arguments(inputs, problem))
    assert relative_rms(found, expected) < 1e-6  # their state is fp32


def test_torch_convolves_as_we_do_where_there_is_no_edge() -> None:
    (peer,) = (peer for peer in peers.peers_of("short_conv") if peer.name == "torch conv1d")
    inputs = CASES["short_conv"].make(problem_of("short_conv"))
    arguments = peer.prepare(inputs, problem_of("short_conv"))
    assert relative_rms(peer.run(*arguments), peer.right(*arguments)) < RIGHT


def test_a_peer_stands_beside_cases_that_exist_and_names_are_unique() -> None:
    for name in CASES:
        names = [peer.name for peer in peers.peers_of(name)]
        assert len(names) == len(set(names))
    assert all(set(peer.cases) <= set(CASES) for peer in peers.PEERS)


def test_a_module_that_does_not_import_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needs("json")() is None
    assert "no_such_module does not import" in (needs("json", "no_such_module")() or "")
