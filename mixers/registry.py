"""Names to mixers: decorate a class with :func:`register`, get it with :func:`build`."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from mixers.errors import ConfigError, DuplicateMixerError, UnknownMixerError, near
from mixers.interface import MixerConfig, TokenMixer

ENTRY_POINT_GROUP = "linmu.mixers"

M = TypeVar("M", bound=type[TokenMixer])
_REGISTRY: dict[str, type[TokenMixer]] = {}
_plugins_loaded = False


def register(name: str, *, config: type[MixerConfig]) -> Callable[[M], M]:
    """Class decorator that makes a mixer available as ``name``.

    Another distribution does the same and names its module in the entry-point group
    ``linmu.mixers``; it is then imported on the first look-up.

    Args:
        name: Lower-case name, as users will write it.
        config: The dataclass of its settings; becomes the class's ``config_class``.

    Raises:
        DuplicateMixerError: The name is taken by another class.
    """

    def decorate(cls: M) -> M:
        taken = _REGISTRY.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise DuplicateMixerError(
                f"mixer {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}; "
                "choose another name."
            )
        cls.config_class = config
        _REGISTRY[name] = cls
        return cls

    return decorate


def get(name: str) -> type[TokenMixer]:
    """Return the mixer class registered as ``name``.

    Raises:
        UnknownMixerError: Nothing is registered under it; near names are listed.
    """
    _load_plugins()
    if name not in _REGISTRY:
        raise UnknownMixerError(
            f"no mixer is called {name!r}.{near(name, _REGISTRY)} Registered: {', '.join(available())}."
        )
    return _REGISTRY[name]


def build(name: str, **config: Any) -> TokenMixer:
    """Build a mixer: ``mixers.build("mmate", dim=4096)``.

    Args:
        name: A registered name; :func:`available` lists them.
        **config: Fields of its config; :func:`describe` lists them. ``dim`` is required.

    Raises:
        UnknownMixerError: No such mixer.
        ConfigError: Unknown field or bad value.
    """
    cls = get(name)
    return cls(cls.config_class.from_dict(config))


def available(pattern: str = "*") -> list[str]:
    """List the registered names that match a shell wildcard, sorted."""
    _load_plugins()
    return sorted(fnmatch.filter(_REGISTRY, pattern))


@dataclasses.dataclass(frozen=True)
class Description:
    """What a mixer is and how it is set; ``print`` it.

    Attributes:
        name: Registered name.
        summary: First paragraph of the class's docstring.
        fields: Field name → (type as written, default or ``"required"``).
    """

    name: str
    summary: str
    fields: dict[str, tuple[str, Any]]

    def __str__(self) -> str:
        width = max(map(len, self.fields))
        rows = [f"  {n:<{width}}  {d!r:<14} {t}" for n, (t, d) in self.fields.items()]
        return "\n".join([f"{self.name}: {self.summary}", *rows])


def describe(name: str) -> Description:
    """Say what the mixer ``name`` is and list the fields of its config.

    Raises:
        UnknownMixerError: No such mixer.
    """
    cls = get(name)
    fields = {}
    for f in dataclasses.fields(cls.config_class):
        default = f.default if f.default is not dataclasses.MISSING else "required"
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        fields[f.name] = (f.type if isinstance(f.type, str) else f.type.__name__, default)
    summary = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return Description(name, summary, fields)


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except DuplicateMixerError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the mixer plugin {entry.name!r} ({entry.value}) failed to load: {error}"
            ) from error
