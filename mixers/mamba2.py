"""Mamba2 from attention's queries, keys and values (arXiv 2405.21060)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.decay import MEMORY_TOKENS, Decay
from mixers.errors import ConfigError
from mixers.interface import MixerConfig, MixerState, Rotary, TokenMixer
from mixers.layout import Scan, TokenLayout
from mixers.ops import feature_map, short_conv, ssd, ssd_step
from mixers.registry import register
from mixers.rotary import apply_rotary
from mixers.weights import at, scan_weights


@dataclass(kw_only=True)
class Mamba2Config(MixerConfig):
    """Settings of ``mamba2``.

    Args:
        decay: One decay a ``"kv_head"`` (states then exist per KV head only) or a query ``"head"``.
        memory: Tokens after which the first and the last head have forgotten all but 1/e of what they read, before
            training; the others are log-spaced between.
        conv_size: Taps of the short convolution on C, B and X; 0 leaves it out.
        feature_map: What is done to C and B: ``"none"``; ``"softmax"``, a learned map to R features then softmax
            of both signs, which makes the state 2·R wide (Hedgehog, arXiv 2402.04347); ``"l2"`` norm. The maps of C
            start as those of the B that they meet, so that like has like features.
        features: R of ``"softmax"``. More of them tell more things apart that were read. None: P.
        normalizer: ``"denominator"`` divides by the sum of weights (with ``"softmax"`` only),
            ``"rms"`` norms each head, ``"none"``.
        output_gate: Whether y is multiplied by silu of a projection of x.
        rotary: Whether the teacher's rotary embedding is applied to C and B.
        chunk_size: Tokens mixed by one matrix product.
    """

    decay: Literal["kv_head", "head"] = "kv_head"
    memory: tuple[float, float] = MEMORY_TOKENS
    conv_size: int = 4
    feature_map: Literal["none", "softmax", "l2"] = "none"
    features: int | None = None
    normalizer: Literal["none", "rms", "denominator"] = "rms"
    output_gate: bool = True
    rotary: bool = False
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_size < 0 or self.chunk_size < 1:
            raise ConfigError(
                f"conv_size must not be negative and chunk_size must be positive, found {self.conv_size} "
                f"and {self.chunk_size}."
            )
        if min(self.memory) <= 0:
            raise ConfigError(f"memory must be positive numbers of tokens, found {self.memory}.")
        if self.features is not None and (self.features < 1 or self.feature_map != "softmax"):
            raise ConfigError(
                f"features must be positive, and go with feature_map='softmax'; found {self.features} with "
                f"feature_map={self.feature_map!r}."
            )
        if self.normalizer == "denominator" and self.feature_map != "softmax":
            raise ConfigError(
                "normalizer 'denominator' needs weights that are not negative; use it with "
                f"feature_map='softmax', found {self.feature_map!r}."
            )


@register("mamba2", config=Mamba2Config)
class Mamba2(TokenMixer):
    """Causal Mamba2 with C = query, B = key, X = value; O(N) time, constant state."""

    config: Mamba2Config

    def __init__(self, config: Mamba2Config, *, projections: bool = True) -> None:
        super().__init__(config, projections=projections)
        h, g, p = self.num_heads, self.num_kv_heads, self.head_dim
        self.decay = Decay(config.dim, g if config.decay == "kv_head" else h, config.memory)
        self.skip = nn.Parameter(torch.zeros(h))
        if config.conv_size:
            identity = torch.zeros((h + 2 * g) * p, config.conv_size)
            identity[:, -1] = 1
            self.conv_weight = nn.Parameter(identity)
        if config.feature_map == "softmax":
            maps = _maps(g, p, config.features or p)
            self.c_map = nn.Parameter(maps.repeat_interleave(h // g, dim=0))
            self.b_map = nn.Parameter(maps)
        if config.normalizer == "rms":
            self.norm_weight = nn.Parameter(torch.full((h, p), 0.3))
        if config.output_gate:
            self.gate_proj = nn.Linear(config.dim, h * p)
            nn.init.normal_(self.gate_proj.weight, std=0.01)
            nn.init.constant_(self.gate_proj.bias, 1.2785)  # silu(1.2785) = 1

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
        """Scan; see :meth:`TokenMixer.mix_heads`."""
        scan = self._scan(layout)
        if self.config.conv_size:
            q, k, v = self._convolve((q, k, v), layout, scan, state)
        if self.config.rotary and rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        denominator = self.config.normalizer == "denominator"
        decay, gate = self.decay(x), self._gate(x)
        norm_weight = self.norm_weight if self.config.normalizer == "rms" else None
        norm_eps = self.config.norm_eps
        if state is not None and x.shape[1] == 1 and layout.clip is None and layout.valid is None:
            c, b = self._features(q, k)
            y = ssd_step(
                c[:, 0],
                b[:, 0],
                v[:, 0],
                (decay[0][:, 0], decay[1][:, 0]),
                state["ssd"],
                denominator=denominator,
                skip=self.skip,
                norm_weight=norm_weight,
                norm_eps=norm_eps,
                gate=None if gate is None else gate[:, 0],
            )
            return y[:, None], None
        c, b = self._scaled(q, k)
        y, final = ssd(
            c,
            b,
            v,
            decay,
            self._backward_decay(x, layout),
            scan=scan,
            denominator=denominator,
            initial_state=None if state is None else state["ssd"],
            skip=self.skip,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            gate=gate,
            maps=self._feature_maps,
            chunk_size=self.config.chunk_size,
        )
        if state is not None:
            state["ssd"].copy_(final.detach())
        return y, None

    @property
    def averages(self) -> bool:
        """Whether the normaliser is a denominator."""
        return self.config.normalizer == "denominator"

    def weigh_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        queries: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
    ) -> Tensor:
        """Weigh by features and decays; see :meth:`TokenMixer.weigh_heads`."""
        scan = self._scan(layout)
        if self.config.conv_size:
            q, k = self._convolve((q, k), layout, scan, None)
        q = at(q, queries)
        if self.config.rotary and rotary is not None:
            cos, sin = rotary
            q, k = apply_rotary(q, at(cos, queries), at(sin, queries)), apply_rotary(k, cos, sin)
        c, b = self._features(q, k)
        return scan_weights(
            c, b, self.decay(x), lambda: self._backward_decay(x, layout), layout, scan, queries
        )

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return ``ssd`` [B, E, K, P (+1)] in fp32 at least, and ``conv`` [B, taps - 1, (H + 2G)·P]."""
        cfg, h, g, p = self.config, self.num_heads, self.num_kv_heads, self.head_dim
        width = 2 * (cfg.features or p) if cfg.feature_map == "softmax" else p
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (batch_size, g if cfg.decay == "kv_head" else h, width, p + (cfg.normalizer == "denominator"))
        state = {"ssd": torch.zeros(shape, dtype=wide, device=device)}
        if cfg.conv_size > 1:
            state["conv"] = torch.zeros(
                batch_size, cfg.conv_size - 1, (h + 2 * g) * p, dtype=dtype, device=device
            )
        return state

    def prepare(self, layout: TokenLayout, *, cached: bool = False) -> None:
        """Make the reading order; see :meth:`TokenMixer.prepare`."""
        self._scan(layout)

    def _scan(self, layout: TokenLayout) -> Scan:
        return layout.scan("thw")

    def _backward_decay(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor] | None:
        return None

    def _convolve(
        self, heads: tuple[Tensor, ...], layout: TokenLayout, scan: Scan, state: MixerState | None
    ) -> tuple[Tensor, ...]:
        """Convolve q, k and v: on a GPU each where it stands, since joining more than a token would cost a copy."""
        q, parts = heads[0], [t.flatten(2) for t in heads]
        widths = [t.shape[2] for t in parts]
        joined = q.shape[1] == 1 or not q.is_cuda
        if joined:
            parts = [torch.cat(parts, dim=2)]
        sizes = [t.shape[2] for t in parts]
        histories: Sequence[Tensor | None] = [None] * len(parts)
        if state is not None and "conv" in state:
            history = state["conv"].to(q.dtype, copy=True)
            for table, edge in ((layout.valid, False), (layout.vision, True)):
                if table is not None:
                    history = history * (table[:, 0] != edge)[:, None, None]
            self._remember_inputs(state["conv"], history, parts, layout, scan)
            histories = history.split(sizes, dim=2)
        mixed: Sequence[Tensor] = [
            short_conv(part, weight, scan=scan, history=before)
            for part, weight, before in zip(parts, self.conv_weight[: sum(sizes)].split(sizes), histories)
        ]
        if joined:
            mixed = mixed[0].split(widths, dim=2)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in mixed)

    @torch.no_grad()
    def _remember_inputs(
        self, kept: Tensor, history: Tensor, parts: list[Tensor], layout: TokenLayout, scan: Scan
    ) -> None:
        """Keep the last taps - 1 inputs of the text run that is open at the end, zeros elsewhere."""
        taps = kept.shape[1]
        recent = torch.cat([history, torch.cat([t[:, -taps:] for t in parts], dim=2)], dim=1)[:, -taps:]
        if scan.run is not None:
            run = torch.cat([scan.run[:, :1].expand(-1, taps), scan.run[:, -taps:]], dim=1)[:, -taps:]
            recent = recent * (run == run[:, -1:])[..., None]
        for table, edge in ((layout.valid, False), (layout.vision, True)):
            if table is not None:
                recent = recent * (table[:, -1] != edge)[:, None, None]
        kept.copy_(recent)

    @property
    def _feature_maps(self) -> tuple[Tensor, Tensor] | None:
        return (self.c_map, self.b_map) if self.config.feature_map == "softmax" else None

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (c, b), maps = self._scaled(q, k), self._feature_maps
        return (c, b) if maps is None else (feature_map(c, maps[0]), feature_map(b, maps[1]))

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """C and B; where there are maps, what these are made of."""
        if self.config.feature_map == "softmax":
            return q, k
        if self.config.feature_map == "l2":
            wide = torch.promote_types(q.dtype, torch.float32)  # fp16 has no epsilon small enough
            q, k = (F.normalize(t.to(wide), dim=-1).to(t.dtype) for t in (q, k))
            return q, k
        return q, k * self.scale  # the one with fewer heads

    def _gate(self, x: Tensor) -> Tensor | None:
        return self.gate_proj(x).unflatten(-1, (-1, self.head_dim)) if self.config.output_gate else None


def _maps(heads: int, width: int, features: int) -> Tensor:
    """Maps [heads, P, R]: the identity, and beside it, where R is more than P, random rotations."""
    maps = torch.eye(width, features).repeat(heads, 1, 1)
    for start in range(width, features, width):
        wide = torch.randn(heads, width, width, dtype=torch.float32)  # qr knows no 16 bits
        maps[..., start : start + width] = torch.linalg.qr(wide)[0][..., : features - start]
    return maps
