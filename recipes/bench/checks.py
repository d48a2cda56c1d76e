"""Whether an op is right: its results and every gradient against fp64, on the device, for many kinds of rows."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixers import BackendError, TokenLayout
from mixers.ops import triton_support
from mixers.ops.dispatch import Backend
from recipes.bench.cases import CASES, Case, Inputs, Problem, Shapes, tensors
from recipes.errors import RecipeError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest RMS error relative to the RMS of the form in fp64 on the same inputs, by dtype; of gradients too."""

DECAYS = ("usual", "gone", "kept")


class CheckFailedError(RecipeError, RuntimeError):
    """An op disagrees with its form in fp64, so its speed means nothing."""


@dataclass(frozen=True)
class Errors:
    """How far a result is from what it should be, as relative RMS.

    Attributes:
        value: Of the outputs, the largest.
        gradient: Of the gradients, the largest; None where there are none.
        worst: Name of the argument whose gradient that is.
    """

    value: float
    gradient: float | None = None
    worst: str | None = None

    @property
    def largest(self) -> float:
        """The largest of all; NaN if one is."""
        parts = [self.value, 0.0 if self.gradient is None else self.gradient]
        return math.nan if any(map(math.isnan, parts)) else max(parts)


def check(name: str, backend: str, problem: Problem, *, gradients: bool = True) -> Errors:
    """Compare a backend of a case with the case's form in fp64.

    Args:
        name: Key of :data:`~recipes.bench.cases.CASES`.
        backend: Which.
        problem: What to draw the arguments for.
        gradients: Whether to compare gradients too, where the case has them.

    Raises:
        CheckFailedError: An error is above :data:`TOLERANCE`, or not a number.
    """
    errors = errors_of(name, backend, problem, gradients=gradients)
    if not errors.largest <= TOLERANCE[problem.dtype]:
        what = (
            "its result"
            if not errors.value <= TOLERANCE[problem.dtype]
            else f"its gradient of {errors.worst}"
        )
        raise CheckFailedError(
            f"{name} on {backend}: {what} is off by {errors.largest:.2g} relative RMS in {problem.dtype}, more "
            f"than {TOLERANCE[problem.dtype]:.2g}: no speed is reported of a wrong result."
        )
    return errors


def errors_of(name: str, backend: str, problem: Problem, *, gradients: bool = True) -> Errors:
    """Return the errors of a backend of a case; see :func:`check`."""
    case = CASES[name]
    inputs = case.make(problem)
    one_row = problem.layout.batch_size == 1 and problem.layout.valid is problem.layout.sequence is None
    dense = case.dense if one_row and problem.layout.length <= 512 else None

    def oracle(*args: Any, **kwargs: Any) -> Any:
        return dense(*args, **kwargs) if dense else case.op(*args, **kwargs, backend="reference")

    def run(*args: Any, **kwargs: Any) -> Any:
        return case.op(*args, **kwargs, backend=backend)

    return compare(
        run,
        oracle,
        inputs,
        case.names,
        valid=problem.layout.valid,
        state=case.state,
        gradients=gradients and case.state is None,
    )


def compare(
    run: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Inputs,
    names: Sequence[str] = (),
    *,
    valid: Tensor | None = None,
    state: int | None = None,
    gradients: bool = True,
    apart: bool = False,
) -> Errors:
    """Compare a function with another that is called with the same arguments in fp64.

    The gradients of an argument that is a tuple, such as a decay (log_a, dt), count as one vector.

    Args:
        run: What is judged.
        oracle: What is right.
        inputs: Arguments of both.
        names: Of the positional arguments.
        valid: bool [B, N]: tokens whose outputs count. None: all.
        state: Position of an argument that is updated in place.
        gradients: Whether to compare those of the positional arguments.
        apart: Whether the gradient of each tensor of a tuple counts by itself.
    """
    found, leaves = _outputs(run, inputs, state, gradients)
    wanted, wide_leaves = _outputs(oracle, in_fp64(inputs), state, gradients)
    pairs = list(zip(found, wanted))
    if valid is not None:
        mask = valid.view(*valid.shape, *[1] * (found[0].ndim - 2))
        pairs[0] = (found[0] * mask, wanted[0] * mask)
    value = max((relative_rms(a, b) for a, b in pairs), key=lambda e: math.inf if math.isnan(e) else e)
    if not gradients:
        return Errors(value)
    device = wanted[0].device
    generator = torch.Generator(device).manual_seed(99)
    upstream = torch.randn(wanted[0].shape, generator=generator, device=device).to(found[0].dtype)
    got = _gradients(pairs[0][0], leaves, upstream)
    right = _gradients(pairs[0][1], wide_leaves, upstream.double())
    worst, name = 0.0, None
    for place, group in enumerate(zip(got, right)):
        if group[0] and not apart:
            group = ([_joined(group[0])], [_joined(group[1])])
        for error in itertools.starmap(relative_rms, zip(*group)):
            if name is None or not error <= worst:
                worst, name = error, names[place] if place < len(names) else str(place)
    return Errors(value, worst, name)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """Return the RMS of the difference over the RMS of what is wanted, or alone where that is 0."""
    found, wanted = found.detach().double(), wanted.detach().double()
    difference, scale = (t.square().mean().sqrt() for t in (found - wanted, wanted))
    return float(difference / torch.where(scale > 0, scale, 1.0))


def in_fp64(value: Any) -> Any:
    """Return an op's arguments with every floating tensor, and the weights of modules, in fp64."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Inputs):
        return Inputs(in_fp64(value.args), in_fp64(value.kwargs))
    if type(value) in (tuple, list):
        return tuple(in_fp64(part) for part in value)
    return {key: in_fp64(part) for key, part in value.items()} if type(value) is dict else value


def contenders(case: Case, names: Sequence[str] | None = None) -> Iterator[Backend]:
    """Yield the backends of a case that run here; interpreted kernels only where they are asked for."""
    for backend in case.op.backends.values():
        if names is not None and backend.name not in names:
            continue
        slow = triton_support.interpreting() and backend.hesitates() and names is None
        if backend.unavailable() is None and not slow:
            yield backend


def check_table(
    names: Sequence[str],
    shapes: Shapes,
    lengths: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: torch.device | str = "cpu",
    backends: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the errors of every backend over kinds of rows; nothing is raised, so that the table is whole.

    Args:
        names: Keys of :data:`~recipes.bench.cases.CASES`.
        shapes: Widths.
        lengths: Tokens of the rows, about; at the others than the first the row is text, video, text.
        dtypes: Of the inputs.
        device: Where to run.
        backends: Which. Default: all that run here.
        progress: Told (op on backend, tokens) before each check.

    Returns:
        A row a check: ``op``, ``by``, ``dtype``, ``row`` (its kind), ``decay``, ``tokens``, ``error`` (of the
        outputs), ``gradient_error``, ``worst`` (gradient) and ``right``, and ``note`` where it failed. An error
        that is not a number is None; so is ``right`` where the backend does not take such arguments.
    """
    device, rows = torch.device(device), []
    for name in names:
        case = CASES[name]
        for backend in [backend.name for backend in contenders(case, backends)]:
            for dtype in dtypes:
                for kind, problem in _problems(case, shapes, lengths, dtype, device):
                    if progress is not None:
                        progress(f"checking {name} on {backend}", problem.layout.length)
                    rows.append(
                        {
                            "table": "check",
                            "op": name,
                            "by": backend,
                            "dtype": str(dtype).removeprefix("torch."),
                            "row": kind,
                            "decay": problem.decay,
                            "tokens": problem.layout.batch_size * problem.layout.length,
                            **_checked(name, backend, problem),
                        }
                    )
    return rows


def layouts(length: int, device: torch.device | str = "cpu") -> Mapping[str, TokenLayout]:
    """Return rows of about ``length`` tokens (at least 64) that are hard in one way each, by name."""
    side = max(2, min(16, math.isqrt(length // 8)))
    grid = (max(1, length // side**2), side, side)
    size = math.prod(grid)
    half = (max(1, grid[0] // 2), side, side)
    padded = torch.ones(2, length + 5, dtype=torch.bool)
    padded[0, : length // 3], padded[1, -(length // 4) :] = False, False
    clip_in_padded = (max(1, grid[0] // 4), side, side)
    parts = [length // 5, 1, length // 3, length - length // 5 - 1 - length // 3]
    sequence = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    tiny = [(start, (1, 2, 2)) for start in range(0, length - 4, 5)]
    packed = [(start, (1, 3, 2)) for start in (1, parts[0] + 2, length - 7)]
    rows: dict[str, dict[str, Any]] = {
        "text": {"length": length, "clips": [[]]},
        "one clip": {"length": size, "clips": [[(0, grid)]]},
        "text, clip, text": {"length": length, "clips": [[(length // 4, half)]]},
        "tiny clips": {"length": length, "clips": [tiny]},
        "padded": {
            "length": length + 5,
            "clips": [[(length // 3 + 2, clip_in_padded)], [(1, clip_in_padded)]],
            "valid": padded,
        },
        "packed": {"length": length, "clips": [packed], "sequence": sequence[None]},
    }
    return {name: TokenLayout.from_grids(**row).to(device) for name, row in rows.items()}


def _problems(
    case: Case, shapes: Shapes, lengths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Problem]]:
    if case.row == "batch":
        layout = case.layout(shapes, 1, device)
        for decay in DECAYS:
            yield "batch", Problem(shapes, layout, dtype, decay)
        return
    for kind, layout in layouts(lengths[0], device).items():
        if not (kind == "text" and case.row == "clip"):
            yield kind, Problem(shapes, layout, dtype)
    first = case.layout(replace(shapes, text=32, frame=(8, 8)), max(lengths[0], 96), device)
    if "decay" in case.names:
        for decay in DECAYS[1:]:
            yield case.row, Problem(shapes, first, dtype, decay)
    for length in lengths[1:]:
        yield case.row, Problem(shapes, case.layout(shapes, length, device), dtype)


def _checked(name: str, backend: str, problem: Problem) -> dict[str, Any]:
    try:
        errors = errors_of(name, backend, problem)
    except Exception as error:
        right = None if isinstance(error, BackendError) else False
        return {"error": None, "gradient_error": None, "worst": None, "right": right, "note": one_line(error)}
    return {
        "error": _number(errors.value),
        "gradient_error": _number(errors.gradient),
        "worst": errors.worst,
        "right": bool(errors.largest <= TOLERANCE[problem.dtype]),
        "note": None,
    }


def one_line(error: Exception) -> str:
    """Say an error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def check_problem(
    case: Case, shapes: Shapes, dtype: torch.dtype, device: torch.device, length: int = 224
) -> Problem:
    """Return the small problem on which a case is checked before it is timed."""
    small = replace(shapes, text=32, frame=(8, 8), batch=min(shapes.batch, 8))
    return Problem(small, case.layout(small, length, device), dtype)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _outputs(
    function: Callable[..., Any], inputs: Inputs, state: int | None, gradients: bool
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Call on copies of the arguments; return the outputs, and the leaves of each positional argument."""
    args = [_copied(value, gradients) for value in inputs.args]
    with torch.set_grad_enabled(gradients):
        y = function(*args, **inputs.kwargs)
    outputs = list(y) if isinstance(y, tuple) else [y]
    if state is not None:
        outputs.append(args[state])
    return outputs, [list(tensors(value)) for value in args]


def _copied(value: Any, gradients: bool) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(gradients and value.is_floating_point())
    return tuple(_copied(part, gradients) for part in value) if type(value) is tuple else value


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in parts])


def _gradients(y: Tensor, leaves: list[list[Tensor]], upstream: Tensor) -> list[list[Tensor]]:
    flat = [leaf for group in leaves for leaf in group]
    found = torch.autograd.grad(y, flat, upstream, allow_unused=True)
    filled = iter(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, flat))
    return [[next(filled).double() for _ in group] for group in leaves]
