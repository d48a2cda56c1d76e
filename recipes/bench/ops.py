"""The ops behind the mixers: time and memory at growing length, our backends, others' parts and the limits beside.

No speed is reported of a backend that does not agree, gradients included, with the op's form in fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixers.errors import near
from mixers.ops.dispatch import Backend
from recipes.bench.cases import CASES, SHAPES, Case, Inputs, Problem, Shapes, tensors
from recipes.bench.checks import (
    CheckFailedError,
    Errors,
    check,
    check_problem,
    compare,
    contenders,
    one_line,
)
from recipes.bench.measure import copies_beyond_cache, lap_seconds, peak_bytes
from recipes.bench.peers import peers_of
from recipes.bench.peers.peer import Peer
from recipes.bench.prefill import expected_seconds
from recipes.bench.roofline import Ceilings, forward_work, size_of, training_work
from recipes.errors import RecipeError

PEER_TOLERANCE = 5e-2
"""A peer may err more than we may, lest its speed go uncounted for a rounding."""

Row = dict[str, Any]
Run = Callable[..., Any]
Tell = Callable[[str, int], None]


class UnknownBenchmarkError(RecipeError, LookupError):
    """No op is benchmarked under that name."""


def known(names: Sequence[str] | None) -> list[str]:
    """Return the names of cases asked for; all for None or none.

    Raises:
        UnknownBenchmarkError: A name is no case; near names are given.
    """
    for name in names or ():
        if name not in CASES:
            raise UnknownBenchmarkError(
                f"no op is benchmarked as {name!r}.{near(name, CASES)} There are: {', '.join(CASES)}."
            )
    return list(names or CASES)


def measure_ops(
    names: Sequence[str] | None = None,
    lengths: Sequence[int] = (8192, 16384, 32768, 65536),
    *,
    shapes: Shapes = SHAPES["small"],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backends: Sequence[str] | None = None,
    ceilings: Ceilings | None = None,
    backward: bool = False,
    peers_to: int = 131072,
    repeats: int = 3,
    max_seconds: float = math.inf,
    progress: Callable[[str, int], None] | None = None,
) -> list[Row]:
    """Check each op against its form in fp64, then measure it, and its peers, at growing length.

    Args:
        names: Keys of :data:`~recipes.bench.cases.CASES`. Default: all.
        lengths: Tokens of the row, rising.
        shapes: Widths.
        dtype: Of the inputs.
        device: Where to run.
        backends: Which of ours. Default: all that run here.
        ceilings: What the machine reaches. None: the limits are left out.
        backward: Whether forward and backward together are measured too.
        peers_to: Longest row that peers are given; 0 leaves them out.
        repeats: Timed laps, of which the median counts.
        max_seconds: Leave out lengths where one run is expected to take longer.
        progress: Told (op on backend, tokens) before each measurement.

    Returns:
        A row an op, implementation and length: ``table`` (``"speed"``), ``op``, ``by`` (our backend or the peer),
        ``kind`` (``"ours"``, ``"peer"`` or ``"another"``: a peer that computes something else), ``dtype``,
        ``tokens``, ``fwd_ms``, ``fwd_bwd_ms``, ``ns_per_token`` (forward), ``peak_mib`` and ``fwd_bwd_peak_mib``
        (above the inputs), the limits ``bytes_ms`` and ``products_ms`` and, of both passes,
        ``fwd_bwd_limit_ms``; ``error`` and ``gradient_error`` of the check; and ``note``, which says what is
        missing and why. A peer that is not here has one row, without a length.

    Raises:
        CheckFailedError: A backend's error is above :data:`~recipes.bench.checks.TOLERANCE`.
        UnknownBenchmarkError: A name is no case.
    """
    names, device, tell = known(names), torch.device(device), progress or (lambda *_: None)
    watch = Stopwatch(device, repeats, max_seconds, ceilings)
    rows: list[Row] = []
    for name in names:
        case = CASES[name]
        trains = backward and case.state is None
        problems = {
            length: Problem(shapes, case.layout(shapes, length, device), dtype)
            for length in ([shapes.batch] if case.row == "batch" else lengths)
        }
        for backend in contenders(case, backends):
            rows += _our_rows(name, backend, problems, watch, trains, tell)
        within = {length: problem for length, problem in problems.items() if length <= peers_to}
        for peer in peers_of(name) if within else ():
            rows += _peer_rows(name, peer, within, watch, trains, tell)
    return rows


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by how much more than linearly the time of each op grows from its first length to its last.

    1 is linear; named ``<op>_growth``, or ``<op>_<backend>_growth`` but for the reference.
    """
    found = {}
    ours = [row for row in rows if row.get("kind") == "ours" and row.get("ns_per_token")]
    for (op, by), group in itertools.groupby(ours, key=lambda row: (row["op"], row["by"])):
        costs = [row["ns_per_token"] for row in group]
        if len(costs) > 1:
            found[f"{op}_growth" if by == "reference" else f"{op}_{by}_growth"] = costs[-1] / costs[0]
    return found


@dataclass(frozen=True)
class Stopwatch:
    """How implementations are timed.

    Attributes:
        device: Where they run.
        repeats: Timed laps, of which the median counts.
        max_seconds: Lengths where one run is expected to take longer are left out.
        ceilings: What the machine reaches. None: the limits are left out.
    """

    device: torch.device
    repeats: int
    max_seconds: float
    ceilings: Ceilings | None

    def row(
        self,
        run: Run,
        make: Callable[[Problem], Inputs],
        problem: Problem,
        seen: list[tuple[int, float]],
        *,
        trains: bool,
        case: Case | None = None,
    ) -> Row:
        """Time one implementation on one problem; what cannot be measured is None, and ``note`` says why.

        Args:
            run: The implementation.
            make: From a problem to its arguments.
            problem: What to draw them for.
            seen: (tokens, seconds) at shorter lengths; this one is added.
            trains: Whether to time forward and backward together too.
            case: Whose limits to add. None: none.
        """
        row: Row = dict.fromkeys(("fwd_ms", "fwd_bwd_ms", "ns_per_token", "peak_mib", "fwd_bwd_peak_mib"))
        row["note"] = None
        tokens = problem.layout.batch_size * problem.layout.length
        if expected_seconds(seen, tokens) > self.max_seconds:
            return row | {"note": "would take too long"}
        try:
            first = make(problem)
            copies = copies_beyond_cache(size_of(first), self.device)
            sets = [first, *(make(replace(problem, seed=100 * n)) for n in range(1, copies))]
            output = _first(_forward(run, first))
            if case is not None and self.ceilings is not None:
                row |= _limits(case, problem, first, output, trains, self.ceilings)
            forwards = [partial(_forward, run, inputs) for inputs in sets]
            row["peak_mib"] = peak_bytes(forwards[0], self.device) / 2**20
            seconds = lap_seconds(forwards, self.device, warmup=1, repeats=self.repeats)
            seen.append((tokens, seconds))
            row |= {"fwd_ms": 1e3 * seconds, "ns_per_token": 1e9 * seconds / tokens}
            if trains:
                both = [partial(_both, run, inputs, torch.randn_like(output)) for inputs in sets]
                both[0]()
                row["fwd_bwd_peak_mib"] = peak_bytes(both[0], self.device) / 2**20
                row["fwd_bwd_ms"] = 1e3 * lap_seconds(both, self.device, warmup=1, repeats=self.repeats)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            row["note"] = "out of memory" if row["fwd_ms"] is None else "out of memory in the backward"
        except Exception as error:
            row["note"] = one_line(error)
        return row


def _our_rows(
    name: str, backend: Backend, problems: Mapping[int, Problem], watch: Stopwatch, trains: bool, tell: Tell
) -> Iterator[Row]:
    case, problem = CASES[name], next(iter(problems.values()))
    start = _start(name, backend.name, "ours", problem)
    small = check_problem(case, problem.shapes, problem.dtype, watch.device)
    sample = case.make(small)
    reason = backend.unsupported(*sample.args, **sample.kwargs)
    if reason is None:
        tell(f"checking {name} on {backend.name}", 0)
        try:
            errors = check(name, backend.name, small, gradients=trains)
        except CheckFailedError:
            raise
        except Exception as error:
            reason = one_line(error)
    if reason is not None:
        yield start | {"tokens": None, "note": reason}
        return
    seen: list[tuple[int, float]] = []
    for length, problem in problems.items():
        tell(f"{name} on {backend.name}", length)
        row = watch.row(
            partial(case.op, backend=backend.name), case.make, problem, seen, trains=trains, case=case
        )
        yield start | {"tokens": length} | row | _shown(errors)


def _peer_rows(
    name: str, peer: Peer, problems: Mapping[int, Problem], watch: Stopwatch, trains: bool, tell: Tell
) -> Iterator[Row]:
    """Run a peer at its longest length first, where its kernels tune themselves, check it in small, and time it."""
    case, longest = CASES[name], problems[max(problems)]
    start = _start(name, peer.name, "another" if peer.another else "peer", longest)
    note = peer.unavailable()
    if note is not None:
        yield start | {"tokens": None, "note": note}
        return

    def make(problem: Problem) -> Inputs:
        return Inputs(peer.prepare(case.make(problem), problem), {})

    tell(f"checking {name} by {peer.name}", 0)
    small = make(check_problem(case, longest.shapes, longest.dtype, watch.device, length=736))
    trains, notes = trains and peer.gradients, [peer.another] if peer.another else []
    errors, wrong = _peer_errors(peer, make(longest), small, trains=False)
    if errors is None or wrong:
        yield start | {"tokens": None, "note": wrong}
        return
    if trains:
        with_gradients, wrong = _peer_errors(peer, make(longest), small, trains=True)
        errors, trains = with_gradients or errors, wrong is None
        notes += [f"no backward: {wrong}"] if wrong else []
    seen: list[tuple[int, float]] = []
    for length, problem in problems.items():
        tell(f"{name} by {peer.name}", length)
        row = watch.row(peer.run, make, problem, seen, trains=trains)
        said = "; ".join(filter(None, [*notes, row["note"]])) or None
        yield start | {"tokens": length} | row | _shown(errors) | {"note": said}


def _peer_errors(
    peer: Peer, long: Inputs, small: Inputs, *, trains: bool
) -> tuple[Errors | None, str | None]:
    """Return a peer's errors, and what is wrong with it."""
    try:
        if trains:
            _both(peer.run, long)
        else:
            _forward(peer.run, long)
        errors = compare(peer.run, peer.right, small, gradients=trains, apart=True)
    except Exception as error:
        return None, one_line(error)
    wrong = not errors.largest <= PEER_TOLERANCE
    return errors, f"wrong by {errors.largest:.2g} relative RMS" if wrong else None


def _start(name: str, by: str, kind: str, problem: Problem) -> Row:
    dtype = str(problem.dtype).removeprefix("torch.")
    return {"table": "speed", "op": name, "by": by, "kind": kind, "dtype": dtype}


def _limits(
    case: Case, problem: Problem, inputs: Inputs, output: Tensor, trains: bool, ceilings: Ceilings
) -> Row:
    moved, computed = forward_work(case, problem, inputs, output).seconds(ceilings)
    both = max(training_work(case, problem, inputs, output).seconds(ceilings)) if trains else None
    limits = {"bytes_ms": moved, "products_ms": computed, "fwd_bwd_limit_ms": both}
    return {limit: None if seconds is None else 1e3 * seconds for limit, seconds in limits.items()}


def _forward(run: Run, inputs: Inputs) -> Any:
    with torch.no_grad():
        return run(*inputs.args, **inputs.kwargs)


def _both(run: Run, inputs: Inputs, upstream: Tensor | None = None) -> None:
    leaves = list(tensors(inputs.args))
    for leaf in leaves:
        leaf.requires_grad_()
    y = _first(run(*inputs.args, **inputs.kwargs))
    torch.autograd.grad(y, leaves, torch.ones_like(y) if upstream is None else upstream, allow_unused=True)


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _shown(errors: Errors) -> Row:
    return {"error": errors.value, "gradient_error": errors.gradient}
