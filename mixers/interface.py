"""What every token mixer is: a config dataclass and a module with one forward signature."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

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

    Raises:
        ConfigError: A count is not positive or the head counts do not divide.
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

    def __post_init__(self) -> None:
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
        self._check_choice("qk_norm", "none", "head", "full")

    def _divided(self, by: int, name: str) -> int:
        if by < 1 or self.dim % by:
            raise ConfigError(
                f"dim {self.dim} is not a multiple of {name} {by}; pass num_heads and head_dim explicitly."
            )
        return self.dim // by

    def _check_choice(self, field: str, *allowed: Any) -> None:
        if (value := getattr(self, field)) not in allowed:
            raise ConfigError(f"{field} must be one of {', '.join(map(repr, allowed))}; found {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dict; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MixerConfig:
        """Build the config from a dict.

        Raises:
            ConfigError: A field is unknown (near names are listed) or has a bad value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no field {name!r}.{near(name, known)} Its fields: {', '.join(known)}."
                )
        if "dim" not in fields:
            raise ConfigError(f"{cls.__name__} needs dim, the model width.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


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
    """

    config_class: ClassVar[type[MixerConfig]] = MixerConfig

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
                what comes after it. Gradients do not flow through it.

        Returns:
            [B, N, D]. What stands at padding is unspecified but finite.

        Raises:
            ShapeError: ``x`` or ``rotary`` has another shape.
            LayoutError: ``layout`` is of another batch size or length.
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
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

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
        for name, table in zip(("cos", "sin"), rotary or ()):
            if table.ndim != 3 or table.shape[1] != x.shape[1] or table.shape[0] not in (1, x.shape[0]):
                raise ShapeError(
                    f"rotary {name} must be [B, N, R] with [B, N] = {list(x.shape[:2])}, found "
                    f"{list(table.shape)}."
                )
        if state is not None:
            rows = {name: t.shape[0] for name, t in state.items()}
            if any(r != x.shape[0] for r in rows.values()):
                raise StateError(f"the state is for other batch sizes than x's {x.shape[0]}: {rows}.")
        return layout
