"""Ops called eagerly pass by their custom ops: with equal bits, and nowhere that torch traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mixers import TokenLayout
from mixers.ops import triton_support

pytestmark = pytest.mark.skipif(triton_support.unavailable() is not None, reason="no kernel can run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = TokenLayout.from_grids(24, [[(3, (2, 2, 3))]])
LENGTH = 24


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def feature_map() -> tuple[Any, list[Tensor]]:
    from mixers.ops.feature_map.triton import feature_map

    return feature_map, [draw(1, LENGTH, 2, 8), draw(2, 8, 8)]


def finish() -> tuple[Any, list[Tensor]]:
    from mixers.ops.finish.triton import finish

    heads = (1, LENGTH, 2, 8)
    return (
        lambda y, v, skip, gate: finish(y, v, skip, gate=gate),
        [draw(*heads), draw(*heads), draw(2), draw(*heads)],
    )


def gate() -> tuple[Any, list[Tensor]]:
    from mixers.ops.gate.triton import weighted_sum

    return (
        lambda first, second, weight: weighted_sum([first, second], [weight, weight.sigmoid()]),
        [draw(1, LENGTH, 2, 8), draw(1, LENGTH, 2, 8), draw(1, LENGTH, 1, 1)],
    )


def short_conv() -> tuple[Any, list[Tensor]]:
    from mixers.ops.short_conv.triton import short_conv

    scan = LAYOUT.to(DEVICE).scan("wht")
    return lambda x, weight: short_conv(x, weight, scan=scan), [draw(1, LENGTH, 16), draw(16, 4)]


def block_attention(with_lse: bool = False) -> tuple[Any, list[Tensor]]:
    from mixers.ops.window_attention.triton import block_attention

    layout = LAYOUT.to(DEVICE)
    tables = [layout.windows((2, 2, 2)), layout.recent(4, text_only=True)]
    return (
        lambda q, k, v: block_attention(q, k, v, tables, scale=0.3, with_lse=with_lse),
        [draw(1, LENGTH, 2, 8) for _ in range(3)],
    )


def block_attention_with_lse() -> tuple[Any, list[Tensor]]:
    return block_attention(with_lse=True)


def ssd() -> tuple[Any, list[Tensor]]:
    from mixers.ops.ssd.triton import ssd

    scan = LAYOUT.to(DEVICE).scan("wht")

    def run(c: Tensor, b: Tensor, x: Tensor, steps: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        decay = -steps.sigmoid(), steps.sigmoid()
        return ssd(c, b, x, decay, decay, scan=scan, initial_state=start)

    heads = [draw(1, LENGTH, 2, 16) for _ in range(3)]
    return run, [*heads, draw(1, LENGTH, 2), draw(1, 2, 16, 16)]


def ssd_of_features() -> tuple[Any, list[Tensor]]:
    from mixers.ops.ssd.triton import ssd

    def run(
        c: Tensor, b: Tensor, x: Tensor, steps: Tensor, c_map: Tensor, b_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ssd(c, b, x, (-steps.sigmoid(), steps.sigmoid()), denominator=True, maps=(c_map, b_map))

    heads = [draw(1, LENGTH, 2, 16) for _ in range(3)]
    return run, [*heads, draw(1, LENGTH, 2), draw(2, 16, 24), draw(2, 16, 24)]


OPS = {
    "feature_map": feature_map,
    "finish": finish,
    "weighted_sum": gate,
    "short_conv": short_conv,
    "block_attention": block_attention,
    "block_attention lse": block_attention_with_lse,
    "ssd": ssd,
    "ssd of features": ssd_of_features,
}
each_op = pytest.mark.parametrize("name", OPS)


class Watch(TorchDispatchMode):
    """Notes which custom ops of linmu torch calls inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "linmu":
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def measure(
    run: Callable[..., Any], inputs: Sequence[Tensor], autocast: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the inputs, both inside of a region of autocast or neither."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        outputs = run(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        loss = sum(torch.where(y.isfinite(), y, 0).float().sin().sum() for y in outputs)
        return outputs, list(torch.autograd.grad(loss, inputs))


@each_op
@pytest.mark.parametrize("autocast", [False, True])
def test_eager_and_custom_op_give_equal_bits(name: str, autocast: bool) -> None:
    run, inputs = OPS[name]()
    eager = measure(run, inputs, autocast)
    with Watch() as watch:
        custom = measure(run, inputs, autocast)
    op = name.split()[0]
    assert {op, f"{op}_backward"} <= watch.seen
    for found, want in zip(eager, custom):
        assert [t.dtype for t in found] == [t.dtype for t in want]
        assert all(map(torch.equal, found, want))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        again = run(*inputs)
    assert all(map(torch.equal, [again] if isinstance(again, Tensor) else again, eager[0]))


@each_op
def test_eager_passes_by_the_custom_op(name: str) -> None:
    run, inputs = OPS[name]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        measure(run, inputs)
    assert not [event.name for event in profile.events() if event.name.startswith("linmu::")]


@each_op
def test_compiled_traces_the_custom_op(name: str) -> None:
    run, inputs = OPS[name]()
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    found = torch.compile(run, fullgraph=True, backend=backend)(*inputs)
    assert [target for target in graphs[0] if target.startswith(f"linmu.{name.split()[0]}")]
    assert all(map(torch.equal, [found] if isinstance(found, Tensor) else found, measure(run, inputs)[0]))


def test_fake_and_meta_tensors_take_the_custom_op() -> None:
    run, inputs = feature_map()
    meta = [t.detach().to("meta").requires_grad_() for t in inputs]
    assert measure(run, meta)[1][0].shape == inputs[0].shape
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
    assert run(*fakes).shape == (1, LENGTH, 2, 16)
    traced = make_fx(lambda *leaves: measure(run, leaves)[1])(*inputs)
    assert "linmu.feature_map_backward" in traced.code


def test_only_the_inputs_that_need_one_have_a_gradient() -> None:
    run, inputs = ssd()
    want = measure(run, inputs)[1]
    for number, leaf in enumerate(inputs):
        some = [t if t is leaf else t.detach() for t in inputs]
        (found,) = torch.autograd.grad(sum(y.sin().sum() for y in run(*some)), leaf)
        assert torch.equal(found, want[number])


@each_op
def test_recomputed_gives_equal_bits(name: str) -> None:
    run, inputs = OPS[name]()

    def again(*leaves: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)

    assert all(map(torch.equal, measure(run, inputs)[1], measure(again, inputs)[1]))


def test_inputs_changed_in_place_and_second_derivatives_are_refused() -> None:
    run, (x, weight) = feature_map()
    changed = x.detach().clone()
    y = run(changed, weight)
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    (first,) = torch.autograd.grad(run(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first.sum(), x)
