"""What every token mixer is: a config dataclass and a module with one forward signature."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from mixers.errors import ConfigError, LayoutError, ShapeError, StateError, near
from mixers.layout import TokenLayout

MixerState = dict[str, Tensor]
"""Named tensors, each with the batch in its first dimension, updated in place at inference."""

Rotary = tuple[Tensor, Tensor]
"""(cos, sin), each [B, N, R] with R ≤ head_dim, in the rotate-half convention."""


@dataclasses.dataclass(kw_only=True)
class MixerConfig:
    """Fields that every mixer has.

    Args:
        dim: Model width D.
        num_heads: Query heads H. Default: ``dim // head_dim``.
        num_kv_heads: Key/value heads G; H must be a multiple of it. Default: ``num_heads``.
        head_dim: Width P of a head. Default: ``dim // num_heads`` if that is given, else 128.
        layer_idx: Index ℓ of the layer; picks the scan order and the window shift.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has a bias.
        qk_norm: RMS norm of queries and keys before rotary: ``"none"``, over each ``"head"``,
            or over the ``"full"`` projected width.
        norm_eps: Epsilon of those norms.
        scale: Factor on query·key. Default: ``head_dim ** -0.5``.
        softcap: Bound c of the scores of softmax attention, s → c·tanh(s / c) (Gemma 2, arXiv 2408.00118).
            None: unbounded. Mixers without a softmax over scores do not read it.

    Lists become tuples, so that a config read from JSON equals the one written.

    Raises:
        ConfigError: A value is not of its field's type, a count is not positive, or the head counts
            do not divide.
    """

    dim: int
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    layer_idx: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    norm_eps: float = 1e-6
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _with_tuples(getattr(self, field.name))
            setattr(self, field.name, value)
            if not _fits(value, hints[field.name]):
                raise ConfigError(f"{field.name} must be {_spelled(hints[field.name])}; found {value!r}.")
        if self.dim < 1:
            raise ConfigError(f"dim must be positive, found {self.dim}.")
        if self.head_dim is None:
            self.head_dim = 128 if self.num_heads is None else self._divided(self.num_heads, "num_heads")
        if self.num_heads is None:
            self.num_heads = self._divided(self.head_dim, "head_dim")
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ConfigError(
                f"num_heads, num_kv_heads and head_dim must be positive, found {self.num_heads}, "
                f"{self.num_kv_heads} and {self.head_dim}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, found {self.num_heads} and "
                f"{self.num_kv_heads}."
            )
        if self.scale is None:
            self.scale = self.head_dim**-0.5
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap must be positive or None, found {self.softcap}.")

    def _divided(self, by: int, name: str) -> int:
        if by < 1 or self.dim % by:
            raise ConfigError(
                f"dim {self.dim} is not a multiple of {name} {by}; pass num_heads and head_dim explicitly."
            )
        return self.dim // by

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dict; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MixerConfig:
        """Build the config from a dict.

        Raises:
            ConfigError: A field is unknown (near names are listed), missing, or has a bad value.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no field {name!r}.{near(name, known)} Its fields: {', '.join(known)}."
                )
        for name, field in known.items():
            if field.default is field.default_factory is dataclasses.MISSING and name not in fields:
                raise ConfigError(f"{cls.__name__} needs {name}, found {', '.join(fields) or 'no field'}.")
        return cls(**fields)


class TokenMixer(nn.Module):
    """A sequence mixer that can stand where self-attention stood.

    ``y = mixer(x, layout, rotary, state)`` maps [B, N, D] to [B, N, D] and obeys the law of
    causality of :class:`~mixers.TokenLayout`.

    A subclass implements :meth:`mix_heads` and, if it has one, :meth:`init_state`. The projections
    carry the names that Hugging Face attention uses, so a bridge can adopt a teacher's modules.

    Args:
        config: An instance of the class's ``config_class``.
        projections: Whether the mixer owns q, k, v and o projections. A branch of a gated mixer
            that shares its parent's does not.

    Attributes:
        uses_softcap: Whether the mixer bounds its scores as ``config.softcap`` says.
    """

    config_class: ClassVar[type[MixerConfig]] = MixerConfig
    uses_softcap: ClassVar[bool] = False

    def __init__(self, config: MixerConfig, *, projections: bool = True) -> None:
        super().__init__()
        self.config = config
        self.num_heads: int = config.num_heads  # type: ignore[assignment]
        self.num_kv_heads: int = config.num_kv_heads  # type: ignore[assignment]
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.scale: float = config.scale  # type: ignore[assignment]
        if projections:
            width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            self.q_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
            self.k_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
            self.v_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
            self.o_proj = nn.Linear(width, config.dim, bias=config.out_bias)
            if config.qk_norm != "none":
                full = config.qk_norm == "full"
                self.q_norm = nn.RMSNorm(width if full else self.head_dim, eps=config.norm_eps)
                self.k_norm = nn.RMSNorm(kv_width if full else self.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout | None = None,
        rotary: Rotary | None = None,
        state: MixerState | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: [B, N, D].
            layout: Where each token stands. Default: one valid text sequence a row.
            rotary: Rotary embedding of these tokens' positions.
            state: From :meth:`init_state`; read as what came before ``x`` and updated in place to
                what comes after it. The row's first sequence goes on from it, so a new sequence
                needs a new state. Gradients do not flow through it.

        Returns:
            [B, N, D]. What stands at padding is unspecified but finite.

        Raises:
            ShapeError: ``x`` or ``rotary`` has another shape.
            LayoutError: ``layout`` is of another batch size or length, or on another device.
            StateError: ``state`` is of another batch size or mixer.
        """
        layout = self._check_call(x, layout, rotary, state)
        if layout.valid is not None:
            x = x.masked_fill(~layout.valid[..., None], 0)
        return self.mix(x, layout, rotary, state)

    def mix(self, x: Tensor, layout: TokenLayout, rotary: Rotary | None, state: MixerState | None) -> Tensor:
        """Project, mix per head and project back; ``forward`` without its checks."""
        y, _ = self.mix_heads(x, *self.project(x), layout, rotary, state)
        return self.o_proj(y.flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, N, H, P], keys and values [B, N, G, P], normed but not rotated."""
        return *self._queries_and_keys(x), self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q_proj(x), self.k_proj(x)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def mix_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
        state: MixerState | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix projected tokens.

        Returns:
            The mixed values [B, N, H, P], and a bool [B, N] that is False where the mixer has
            nothing for a token (None: it has something for every token).
        """
        raise NotImplementedError

    @property
    def averages(self) -> bool:
        """Whether each head gives an average of values, so that :meth:`attention_weights` can tell of which."""
        return False

    def attention_weights(
        self, x: Tensor, queries: Tensor, layout: TokenLayout | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """Tell how much of each token's value is in some outputs.

        Time and memory are those of Q·N weights a head, for ``forward`` does not make them.

        Args:
            x: [B, N, D].
            queries: int [B, Q], the tokens whose outputs are asked about.
            layout: As for :meth:`forward`.
            rotary: Likewise.

        Returns:
            fp32 or wider [B, H, Q, N]. Of a valid token they are not negative and sum to 1, or are all 0 where the
            mixer has nothing for it; of padding they are unspecified but finite. The values that they
            weigh are those after a short convolution, and a skip is left out.

        Raises:
            ConfigError: The mixer is no average, as :attr:`averages` says.
            ShapeError: As :meth:`forward`, or ``queries`` is not int [B, Q] of tokens.
            LayoutError: As :meth:`forward`.
        """
        if not self.averages:
            raise ConfigError(
                f"{type(self).__name__} with these settings gives no average of values, so it has no attention "
                "weights; softmax attention has, and scans with normalizer='denominator', and gated mixers of "
                "these whose branches share their projections."
            )
        layout = self._check_call(x, layout, rotary, None)
        if queries.ndim != 2 or len(queries) != len(x) or queries.is_floating_point():
            raise ShapeError(
                f"queries must be int [{len(x)}, Q], found {queries.dtype} {list(queries.shape)}."
            )
        if not queries.is_cuda and bool(((queries < 0) | (queries >= x.shape[1])).any()):  # no wait for a GPU
            raise ShapeError(f"queries must be tokens, from 0 to {x.shape[1] - 1}, found others.")
        if layout.padding is not None:
            x = x.masked_fill(layout.padding[..., None], 0)
        return self.weigh_heads(x, *self._queries_and_keys(x), queries.long(), layout, rotary)

    def weigh_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        queries: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
    ) -> Tensor:
        """Return the weights by which :meth:`mix_heads` averages; see :meth:`attention_weights`."""
        raise NotImplementedError

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return the state before the first token.

        Its size does not depend on how many tokens will be read (``attention`` alone grows).

        Args:
            batch_size: Rows B.
            dtype: Type of the kept activations; recurrent sums are kept in fp32 at least.
            device: Where to put it.
        """
        raise NotImplementedError

    def prepare(self, layout: TokenLayout, *, cached: bool = False) -> None:
        """Make the tables of a layout that mixing it asks for; the layout keeps them.

        ``forward`` makes those that are missing. Made before, they are out of what ``torch.compile`` traces.

        Args:
            layout: Where the tokens stand.
            cached: Whether ``forward`` will be given a state.
        """

    def _check_call(
        self, x: Tensor, layout: TokenLayout | None, rotary: Rotary | None, state: MixerState | None
    ) -> TokenLayout:
        dim = self.config.dim
        if x.ndim != 3 or x.shape[-1] != dim:
            raise ShapeError(f"x must be [B, N, {dim}], found {list(x.shape)}.")
        if layout is None:
            layout = TokenLayout.text(x.shape[0], x.shape[1], device=x.device)
        if (layout.batch_size, layout.length) != tuple(x.shape[:2]):
            raise LayoutError(
                f"the layout is for [B, N] = [{layout.batch_size}, {layout.length}] tokens, x has "
                f"{list(x.shape[:2])}."
            )
        if layout.device != x.device:
            raise LayoutError(
                f"the layout is on {layout.device} and x on {x.device}; move it with layout.to(x.device)."
            )
        if rotary is not None:
            self._check_rotary(*rotary, batch_size=x.shape[0], length=x.shape[1])
        if state is not None:
            self._check_state(state, x.shape[0])
        return layout

    def _check_rotary(self, cos: Tensor, sin: Tensor, *, batch_size: int, length: int) -> None:
        rows, tokens, width = cos.shape if cos.ndim == 3 else (0, 0, 0)
        fits = rows in (1, batch_size) and tokens == length and width % 2 == 0 and 0 < width <= self.head_dim
        if not fits or cos.shape != sin.shape:
            raise ShapeError(
                f"rotary cos and sin must be [B, N, R] with [B, N] = {[batch_size, length]} and R even, at most "
                f"{self.head_dim}; found {list(cos.shape)} and {list(sin.shape)}."
            )

    @functools.cached_property
    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape[1:]) for name, t in self.init_state(0).items()}

    def _check_state(self, state: MixerState, batch_size: int) -> None:
        """Refuse a state unlike that of ``init_state``, whose dimensions of size 0 may have grown."""
        found = {name: tuple(t.shape[1:]) for name, t in state.items()}
        expected = self._state_shapes
        if found.keys() != expected.keys() or any(
            len(have) != len(want) or any(w not in (0, h) for h, w in zip(have, want))
            for have, want in ((found[name], expected[name]) for name in expected)
        ):
            raise StateError(
                f"the state is of another mixer: this one's tensors are [B, …] + {expected}, found {found}. "
                "Make it with init_state."
            )
        rows = {name: t.shape[0] for name, t in state.items()}
        if any(r != batch_size for r in rows.values()):
            raise StateError(f"the state is for other batch sizes than x's {batch_size}: {rows}.")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_tuples(v) for k, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Is ``value`` of the annotated type? An int is a float, a bool is neither."""
    kind, of = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, h) for h in of)
    if kind is Literal:
        return value in of
    if kind is tuple:
        of = of[:1] * len(value) if of[1:] == (...,) and isinstance(value, tuple) else of
        return isinstance(value, tuple) and len(value) == len(of) and all(map(_fits, value, of))
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
