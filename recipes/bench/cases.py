"""What `linmu bench ops` measures: each op at widths of a real model, on layouts that show what it does."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mixers
from mixers import TokenLayout
from mixers.decay import INITIAL_DT, MEMORY_TOKENS
from mixers.mmate import SINKS
from mixers.ops import (
    block_attention,
    feature_map,
    finish,
    join_sinks,
    short_conv,
    ssd,
    ssd_step,
    use_backend,
    weighted_sum,
)
from mixers.ops.dispatch import Backend, Op
from recipes.bench.oracles import dense_attention, dense_conv, dense_ssd

CHUNK = 64
"""Tokens of a chunk at which the SSD scan's products are counted."""


@dataclass(frozen=True)
class Shapes:
    """Widths at which ops are measured, and what the row looks like.

    Attributes:
        heads: Query heads H.
        kv_heads: KV heads G.
        head_dim: Width P of a head.
        state: Width K of queries and keys in the scan.
        text: Text tokens of a row, half before its video and half after.
        frame: (h, w) of the video's frames, in tokens.
        batch: Sequences of the one-token step.
    """

    heads: int
    kv_heads: int
    head_dim: int
    state: int
    text: int
    frame: tuple[int, int]
    batch: int


SHAPES = {
    "small": Shapes(heads=4, kv_heads=2, head_dim=64, state=64, text=32, frame=(8, 8), batch=8),
    "7b": Shapes(heads=28, kv_heads=4, head_dim=128, state=128, text=1024, frame=(32, 32), batch=256),
}
"""``7b`` is one layer of Qwen2.5-VL-7B; ``small`` is for processors."""


class Inputs(NamedTuple):
    """An op's arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What the arguments of an op are drawn for.

    Attributes:
        shapes: Widths.
        layout: Where the tokens stand, and on which device.
        dtype: Of activations; decays are fp32, or fp64 with an fp64 dtype.
        decay: ``"usual"``, ``"gone"`` (a ≈ 0) or ``"kept"`` (a ≈ 1).
        seed: Of the random numbers.
    """

    shapes: Shapes
    layout: TokenLayout
    dtype: torch.dtype
    decay: str = "usual"
    seed: int = 0

    def random(self, *shape: int, offset: int = 0, wide: bool = False) -> Tensor:
        """Draw [B, N, …] from a normal distribution; ``wide``: in fp32 at least."""
        generator = torch.Generator(self.layout.device).manual_seed(self.seed + offset)
        batch, length = self.layout.batch_size, self.layout.length
        dtype = torch.promote_types(self.dtype, torch.float32) if wide else self.dtype
        return torch.randn(batch, length, *shape, generator=generator, device=self.layout.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """An op at one setting.

    Attributes:
        op: What is measured: an :class:`~mixers.ops.dispatch.Op`, or what has its backends and is called alike.
        about: What it is, in a line.
        row: ``"video"`` (text, video, text), ``"clip"`` (a video alone), ``"text"``, or ``"batch"``
            (one token of each of many sequences; its cost does not depend on the length).
        make: From a problem to the op's arguments.
        names: What the positional arguments are called.
        products: From a problem to the operations in matrix products of its forward.
        dense: Its O(N²) form, called with the same arguments; None: the reference in fp64 stands for it.
        state: Position of the argument that is updated in place, and counts as an output. None: none is,
            and there are gradients.
    """

    op: Any
    about: str
    row: str
    make: Callable[[Problem], Inputs]
    names: tuple[str, ...]
    products: Callable[[Problem], float]
    dense: Callable[..., Tensor] | None = None
    state: int | None = None

    def layout(self, shapes: Shapes, length: int, device: torch.device) -> TokenLayout:
        """Lay out the row of ``length`` tokens in which the case is measured."""
        if self.row == "batch":
            return TokenLayout.text(shapes.batch, 1, device=device)
        if self.row == "text":
            return TokenLayout.text(1, length, device=device)
        return video(shapes, length, device, text=shapes.text if self.row == "video" else 0)


class WholeMixer:
    """A mixer's ``mix_heads``, on the backends that every op under it has."""

    def __init__(self, *ops: Op) -> None:
        self.ops = ops

    @property
    def backends(self) -> dict[str, Backend]:
        """Name → backend, as an op has them."""
        common = [name for name in self.ops[0].backends if all(name in op.backends for op in self.ops)]
        return {name: self._backend(name, [op.backends[name] for op in self.ops]) for name in common}

    def _backend(self, name: str, parts: list[Backend]) -> Backend:
        def first(reasons: Iterator[str | None]) -> str | None:
            return next((reason for reason in reasons if reason), None)

        return Backend(
            name,
            functools.partial(self, backend=name),
            lambda: first(part.unavailable() for part in parts),
            lambda *args, **kwargs: None,
            lambda: first(part.hesitates() for part in parts),
        )

    def __call__(self, module: Any, *args: Any, rotary: mixers.Rotary, backend: str) -> Tensor:
        """Mix [B, N, H, P] on one backend."""
        with use_backend(backend):
            return module.mix_heads(*args, rotary, None)[0]


def video(shapes: Shapes, length: int, device: torch.device, text: int | None = None) -> TokenLayout:
    """Lay out one row: text, one video of whole frames, text for what is left."""
    text = shapes.text if text is None else text
    frames = (length - text) // math.prod(shapes.frame)
    return TokenLayout.from_grids(length, [[(text // 2, (frames, *shapes.frame))]], device=device)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of an op's arguments that gradients could be taken of, a module's weights too."""
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif type(value) in (tuple, Inputs, list):
        for part in value:
            yield from tensors(part)
    elif type(value) is dict:
        for part in value.values():
            yield from tensors(part)


def heads_of(problem: Problem, state: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries [B, N, H, K], scaled, keys [B, N, G, K] and values [B, N, G, P]; K = P unless ``state``."""
    s = problem.shapes
    width = s.state if state else s.head_dim
    q, k, v = (
        problem.random(heads, size, offset=offset)
        for offset, (heads, size) in enumerate(
            ((s.heads, width), (s.kv_heads, width), (s.kv_heads, s.head_dim))
        )
    )
    return (q * width**-0.5 if state else q), k, v


def decay_of(problem: Problem, heads: int, offset: int) -> tuple[Tensor, Tensor]:
    """Draw (log_a, dt) [B, N, E], log_a = A·dt with memories spread as a new mixer has them."""
    low, high = map(math.log, MEMORY_TOKENS)
    memory = torch.linspace(low, high, heads, dtype=torch.float64, device=problem.layout.device).exp()
    drawn = problem.random(heads, offset=10 + offset, wide=True)
    dt = F.softplus(0.5 * drawn + math.log(math.expm1(INITIAL_DT)))
    rate = {"usual": 1 / (memory * INITIAL_DT), "gone": 120 + 0 * memory, "kept": 1e-5 + 0 * memory}
    return -rate[problem.decay].to(dt) * dt, dt


def _scan(
    problem: Problem, axes: str, *, both: bool = True, per_head: bool = False, mean: bool = False
) -> Inputs:
    q, k, v = heads_of(problem)
    if mean:
        q, k = (torch.cat([t.softmax(-1), (-t).softmax(-1)], dim=-1) for t in (q, k))
    heads = problem.shapes.heads if per_head else problem.shapes.kv_heads
    backward = decay_of(problem, heads, 1) if both else None
    kwargs: dict[str, Any] = {"scan": problem.layout.scan(axes)}
    if mean:
        kwargs["denominator"] = True
    return Inputs((q, k, v, decay_of(problem, heads, 0), backward), kwargs)


def scan_products(
    problem: Problem, *, both: bool = True, per_head: bool = False, mean: bool = False
) -> float:
    """Count the operations of a chunked scan's matrix products.

    A token's share: scores and their sums within the chunk, once for both directions; the chunk's own state, one a
    decay and direction; the state read by each head, one a direction.
    """
    s = problem.shapes
    k, directions = s.state * (1 + mean), 1 + both
    within = s.heads * 2 * CHUNK * (k + s.head_dim) * directions / 2
    states = (s.heads if per_head else s.kv_heads) + s.heads
    return problem.layout.length * (within + directions * states * 2 * k * s.head_dim)


def _windows(problem: Problem) -> Inputs:
    blocks = problem.layout.windows((4, 4, 4), shifted=True)
    return Inputs((*heads_of(problem, state=False), blocks), {"scale": problem.shapes.head_dim**-0.5})


def _window_products(problem: Problem) -> float:
    blocks = problem.layout.windows((4, 4, 4), shifted=True)
    pairs = 0 if blocks is None else int((blocks.queries >= 0).sum(1).square().sum())
    return 4 * problem.shapes.heads * problem.shapes.head_dim * pairs


def _recent(problem: Problem) -> Inputs:
    blocks = problem.layout.recent(128, text_only=False)
    return Inputs((*heads_of(problem, state=False), blocks), {"scale": problem.shapes.head_dim**-0.5})


def _recent_products(problem: Problem) -> float:
    return 4 * problem.shapes.heads * problem.shapes.head_dim * 128 * problem.layout.length


def _conv(problem: Problem) -> Inputs:
    s = problem.shapes
    channels = (s.heads + 2 * s.kv_heads) * s.head_dim
    generator = torch.Generator(problem.layout.device).manual_seed(problem.seed)
    weight = torch.randn(channels, 4, generator=generator, device=problem.layout.device) / 2
    return Inputs((problem.random(channels), weight.to(problem.dtype)), {"scan": problem.layout.scan("wht")})


def _features(problem: Problem) -> Inputs:
    s = problem.shapes
    generator = torch.Generator(problem.layout.device).manual_seed(problem.seed)
    weight = torch.randn(s.heads, s.head_dim, s.head_dim, generator=generator, device=problem.layout.device)
    return Inputs((heads_of(problem, state=False)[0], (weight * s.head_dim**-0.5).to(problem.dtype)), {})


def _finish(problem: Problem) -> Inputs:
    s = problem.shapes
    y, _, v = heads_of(problem, state=False)
    weight = problem.random(s.heads, s.head_dim, offset=6)[0, 0]
    gate = problem.random(s.heads, s.head_dim, offset=7)
    return Inputs((y, v, problem.random(s.heads, offset=8)[0, 0]), {"norm_weight": weight, "gate": gate})


def _weighted_sum(problem: Problem) -> Inputs:
    s = problem.shapes
    ys = tuple(problem.random(s.heads, s.head_dim, offset=offset) for offset in range(2))
    share = problem.random(1, 1, offset=2).sigmoid()
    return Inputs((ys, (share, 1 - share)), {})


def _sinks(problem: Problem) -> Inputs:
    s = problem.shapes
    q = heads_of(problem, state=False)[0]
    y, lse = problem.random(s.heads, s.head_dim, offset=6), problem.random(s.heads, offset=7, wide=True)
    k, v = (problem.random(SINKS, s.kv_heads, s.head_dim, offset=offset)[:, :1] for offset in (8, 9))
    hidden = problem.random(SINKS, offset=10) > 0
    return Inputs((q, y, lse, k.clone(), v.clone()), {"hidden": hidden, "scale": s.head_dim**-0.5})


def _sinks_products(problem: Problem) -> float:
    return 4 * problem.shapes.heads * problem.shapes.head_dim * SINKS * problem.layout.length


def _step(problem: Problem) -> Inputs:
    s = problem.shapes
    now = [t[:, 0] for t in heads_of(problem)]
    decay = tuple(t[:, 0] for t in decay_of(problem, s.kv_heads, 0))
    state = problem.random(s.kv_heads, s.state, s.head_dim, offset=5, wide=True)[:, 0].contiguous()
    weight = problem.random(s.heads, s.head_dim, offset=6)[0, 0]
    gate = problem.random(s.heads, s.head_dim, offset=7)[:, 0]
    skip = problem.random(s.heads, offset=8)[0, 0]
    return Inputs((*now, decay, state), {"skip": skip, "norm_weight": weight, "gate": gate})


def _step_products(problem: Problem) -> float:
    s = problem.shapes
    return 2 * problem.layout.batch_size * (s.heads + s.kv_heads) * s.state * s.head_dim


def _mixer(problem: Problem, **config: Any) -> Inputs:
    s = problem.shapes
    narrow = 128  # the model's width is small, so that the projections of decays and gate weigh nothing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        module = mixers.build(
            "mmate",
            dim=narrow,
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            layer_idx=3,
            text_window=128,  # these three as they were when the bars were measured, whatever the defaults are
            sinks=0,
            memory=MEMORY_TOKENS,
            norm_eps=1e-2,  # a row's first sums can be next to nothing; their direction is no test of a kernel
            **config,
        )
        for part in module.modules():
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                if hasattr(part, name):
                    delattr(part, name)
    angle = problem.random(s.head_dim // 2, offset=7, wide=True).repeat(1, 1, 2)
    rotary = (angle.cos().to(problem.dtype), angle.sin().to(problem.dtype))
    q, k, v = heads_of(problem, state=False)
    module = module.to(problem.layout.device, problem.dtype)
    return Inputs((module, problem.random(narrow, offset=3), q, k, v, problem.layout), {"rotary": rotary})


def _mixer_products(problem: Problem, mean: bool) -> float:
    state = dataclasses.replace(problem.shapes, state=problem.shapes.head_dim)
    scan = scan_products(dataclasses.replace(problem, shapes=state), mean=mean)
    return scan + _window_products(problem)


SCAN = ("c", "b", "x", "decay", "backward_decay")
ATTENTION = ("q", "k", "v", "blocks")
MIXER = ("weights", "x", "q", "k", "v", "layout")
MIXER_OPS = WholeMixer(ssd, short_conv, block_attention, feature_map, finish, weighted_sum)


def _ssd(about: str, axes: str, row: str = "video", **setting: Any) -> Case:
    make = functools.partial(_scan, axes=axes, **setting)
    return Case(ssd, about, row, make, SCAN, functools.partial(scan_products, **setting), dense_ssd)


CASES: dict[str, Case] = {
    "ssd": _ssd("masked scan in both directions, decay per KV head, clips read (w, h, t)", "wht"),
    "ssd_raster": _ssd("the same, clips read in raster order", "thw"),
    "ssd_head": _ssd("the same as ssd, decay per head", "wht", per_head=True),
    "ssd_mean": _ssd("ssd as a weighted mean: state twice as wide, and a denominator", "wht", mean=True),
    "ssd_causal": _ssd("scan in one direction, of text", "thw", row="text", both=False),
    "windows": Case(
        block_attention,
        "4×4×4 windows, shifted, read from raster order; q and k come rotated",
        "clip",
        _windows,
        ATTENTION,
        _window_products,
        dense_attention,
    ),
    "text_window": Case(
        block_attention,
        "causal window of 128 tokens, of text",
        "text",
        _recent,
        ATTENTION,
        _recent_products,
        dense_attention,
    ),
    "short_conv": Case(
        short_conv,
        "short convolution of 4 taps over C, B and X together, clips read (w, h, t)",
        "video",
        _conv,
        ("x", "weight"),
        lambda problem: 0.0,
        dense_conv,
    ),
    "feature_map": Case(
        feature_map,
        "softmax of both signs of a map of every query head",
        "text",
        _features,
        ("x", "weight"),
        lambda problem: problem.layout.length * 2 * problem.shapes.heads * problem.shapes.head_dim**2,
    ),
    "finish": Case(
        finish,
        "skip, norm and gate after a scan",
        "text",
        _finish,
        ("y", "v", "skip"),
        lambda problem: 0.0,
    ),
    "sinks": Case(
        join_sinks,
        "four attention sinks beside what a window has averaged",
        "text",
        _sinks,
        ("q", "y", "lse", "k", "v"),
        _sinks_products,
    ),
    "weighted_sum": Case(
        weighted_sum,
        "the gate over two branches",
        "text",
        _weighted_sum,
        ("ys", "weights"),
        lambda problem: 0.0,
    ),
    "step": Case(
        ssd_step,
        "one token of every sequence of a batch: state in place, skip, norm and gate",
        "batch",
        _step,
        ("c", "b", "x", "decay", "state"),
        _step_products,
        state=4,
    ),
    "mmate": Case(
        MIXER_OPS,
        "the mixing of mmate from q, k, v: both branches, no sinks, convolution, norm, gate; state 128",
        "video",
        functools.partial(_mixer, feature_map="none", normalizer="rms"),
        MIXER,
        functools.partial(_mixer_products, mean=False),
    ),
    "mmate_default": Case(
        MIXER_OPS,
        "the same with mmate's default features and norm: softmax, weighted mean; state 256",
        "video",
        _mixer,
        MIXER,
        functools.partial(_mixer_products, mean=True),
    ),
}
"""What is measured, by name."""
