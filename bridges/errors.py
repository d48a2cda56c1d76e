"""The errors that :mod:`bridges` raises; all derive from :class:`BridgeError`."""

from __future__ import annotations

import functools
import warnings


class BridgeError(Exception):
    """Base class of every error raised on purpose by :mod:`bridges`."""


class UnknownFamilyError(BridgeError, LookupError):
    """No family describes this model, or its attention is not found where the family says."""


class AssumedFamilyWarning(UserWarning):
    """No family lists this model; the message says what was assumed of it."""


class UnsupportedAttentionError(BridgeError, ValueError):
    """The teacher's attention does something that the chosen mixer cannot carry."""


class AlreadyConvertedError(BridgeError, ValueError):
    """The model is converted already, or wrapped in a way that hides its layers."""


class LayerPatternError(BridgeError, ValueError):
    """A layer pattern is malformed, matches nothing, or contradicts another."""


class LayoutCaptureError(BridgeError, ValueError):
    """The vision inputs do not match the tokens."""


class LayoutFallbackWarning(UserWarning):
    """What reaches the model does not tell where its vision stands; the message says what is assumed."""


class CheckpointError(BridgeError, OSError):
    """A checkpoint is missing, incomplete, truncated, or of another format."""


class CacheError(BridgeError, RuntimeError):
    """A cache was used in a way that a recurrent state does not allow."""


class VersionError(BridgeError, RuntimeError):
    """This version of transformers cannot do what is asked."""


@functools.cache
def warn_once(message: str, category: type[Warning], stacklevel: int) -> None:
    """Warn, if the same was not said before; ``stacklevel`` as for :func:`warnings.warn`, from here."""
    warnings.warn(message, category, stacklevel=stacklevel)
