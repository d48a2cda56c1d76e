"""The errors that :mod:`mixers` raises; all derive from :class:`MixerError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixerError(Exception):
    """Base class of every error raised on purpose by :mod:`mixers`."""


class UnknownMixerError(MixerError, LookupError):
    """No mixer of that name is registered."""


class DuplicateMixerError(MixerError, ValueError):
    """A mixer of that name is registered already."""


class ConfigError(MixerError, ValueError):
    """A config has an unknown field, a value out of range, or head counts that do not divide."""


class ShapeError(MixerError, ValueError):
    """A tensor does not have the documented shape."""


class LayoutError(MixerError, ValueError):
    """A :class:`~mixers.TokenLayout` contradicts itself or the tensor it came with."""


class StateError(MixerError, ValueError):
    """A recurrent state does not fit the call it came with."""


class BackendError(MixerError, RuntimeError):
    """The backend that was asked for is unknown or cannot run here."""


def near(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean …?`` for the known names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
