"""Choose, for each op, the implementation that runs: by capability, or as told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mixers.errors import BackendError, near

ENVIRONMENT_VARIABLE = "LINMU_BACKEND"

# No context variable: torch.compile cannot trace one, and backward runs in other threads.
_chosen: list[str] = []
_OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: ``"reference"`` for plain torch.
        run: The implementation.
        unavailable: Returns why it cannot run on this machine, or None if it can.
        unsupported: Returns why it cannot run on these arguments, or None if it can.
        hesitates: Returns why it runs here only when asked for by name, or None if it does not hesitate.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[], str | None]
    unsupported: Callable[..., str | None]
    hesitates: Callable[[], str | None]

    def declines(self) -> str | None:
        """Return why it would not be chosen here unless asked for, or None if it would."""
        return self.unavailable() or self.hesitates()


class Op:
    """A function with several implementations, tried in the order in which they were added.

    Which one runs is decided by, in this order: the ``backend`` argument, :func:`use_backend`, the
    environment variable ``LINMU_BACKEND``, and else the first that can. An explicit choice that
    cannot run is an error, never a silent fallback.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}
        _OPS[name] = self

    def backend(
        self,
        name: str,
        *,
        unavailable: Callable[[], str | None] = lambda: None,
        unsupported: Callable[..., str | None] = lambda *args, **kwargs: None,
        hesitates: Callable[[], str | None] = lambda: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate an implementation to add it after those that are there."""

        def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(name, run, unavailable, unsupported, hesitates)
            return run

        return decorate

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run the op.

        Raises:
            BackendError: The backend asked for is unknown, or cannot run here or on these arguments.
        """
        told = backend or _told()
        if told:
            return self._explicit(told, *args, **kwargs).run(*args, **kwargs)
        for candidate in self.backends.values():
            if candidate.declines() is None and candidate.unsupported(*args, **kwargs) is None:
                return candidate.run(*args, **kwargs)
        raise BackendError(f"no backend of {self.name} can run here: {self.report().reasons}.")

    def _explicit(self, name: str, *args: Any, **kwargs: Any) -> Backend:
        if name not in self.backends:
            raise BackendError(
                f"{self.name} has no backend {name!r}.{near(name, self.backends)} It has: "
                f"{', '.join(self.backends)}."
            )
        choice = self.backends[name]
        reason = choice.unavailable() or choice.unsupported(*args, **kwargs)
        if reason:
            raise BackendError(f"{self.name}: backend {name!r} cannot run: {reason}.")
        return choice

    def report(self) -> OpReport:
        """Say which backend would run and why the others would not."""
        told = _told()
        reasons = {
            b.name: b.unavailable() if b.name == told else b.declines() for b in self.backends.values()
        }
        if told and told not in reasons:
            reasons[told] = "there is no such backend"
        able = [name for name, reason in reasons.items() if reason is None]
        runs = next((name for name in able if not told or name == told), None)
        for name in able:
            if name != runs:
                reasons[name] = f"{told} was asked for" if told else f"{runs} comes first"
        return OpReport(self.name, runs, {n: r for n, r in reasons.items() if r is not None})


@dataclass(frozen=True)
class OpReport:
    """Which backend of an op would run here.

    Attributes:
        op: Name of the op.
        runs: Name of the backend, None if none can.
        reasons: Why each of the others would not.
    """

    op: str
    runs: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        others = "".join(f"; not {name}: {why}" for name, why in self.reasons.items())
        return f"{self.op}: {self.runs}{others}"


class Report(dict[str, OpReport]):
    """Op → which of its backends would run here; printed, a paragraph an op."""

    def __str__(self) -> str:
        lines = []
        for name, report in self.items():
            lines.append(f"{name}: {report.runs or 'nothing can run'}")
            lines += [f"    not {other}: {why}" for other, why in report.reasons.items()]
        return "\n".join(lines)


def backends() -> Report:
    """Say for every op which backend would run here, and why the others would not.

    A backend may still decline certain arguments, a type or a shape: then the next that can runs.
    """
    return Report({name: op.report() for name, op in sorted(_OPS.items())})


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend ``name``."""
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def _told() -> str | None:
    return _chosen[-1] if _chosen else os.environ.get(ENVIRONMENT_VARIABLE)
