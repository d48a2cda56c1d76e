"""Several mixers side by side, weighed per token by a learned gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixers.errors import ConfigError, near
from mixers.interface import MixerConfig, MixerState, Rotary, TokenMixer
from mixers.layout import TokenLayout
from mixers.ops import weighted_sum
from mixers.registry import get, register
from mixers.weights import at

SHARED_FIELDS = frozenset({"dim", "num_heads", "num_kv_heads", "head_dim", "qkv_bias", "out_bias"})


@dataclass(kw_only=True)
class GateConfig(MixerConfig):
    """What every gated mixer is set by.

    Args:
        gate: One weight a ``"token"``, or one a token and ``"head"``.
        gate_bias: What the logits of all branches but the last start with: 0 is equal weights, -3 gives the last
            of two 95 %.
        share_projections: Whether the branches share one set of q, k, v and o projections.
        active: Names of the branches that take part, in a staged training. None: all.
    """

    gate: Literal["token", "head"] = "token"
    gate_bias: float = 0.0
    share_projections: bool = True
    active: tuple[str, ...] | None = None


@dataclass(kw_only=True)
class GatedConfig(GateConfig):
    """Settings of ``gated``.

    Args:
        branches: Branch name → its settings: ``mixer`` (a registered name, default: the branch name)
            and fields of that mixer's config. Widths, head counts and biases come from this config.
    """

    branches: dict[str, dict[str, Any]]


@register("gated", config=GatedConfig)
class Gated(TokenMixer):
    """Weighted sum of two or more mixers with weights learned per token: y = Σ g_b(x) ⊙ branch_b(x).

    The weights sum to 1 over the branches that have something for the token; with two branches
    g = σ(W x + b) and 1 - g. W starts as zero.
    """

    config: GateConfig

    def __init__(self, config: GateConfig, *, projections: bool = True) -> None:
        super().__init__(config, projections=projections and config.share_projections)
        settings = self.branch_settings(config)
        if len(settings) < 2:
            raise ConfigError(f"a gated mixer needs two branches or more, found {list(settings)}.")
        common = {f: getattr(config, f) for f in MixerConfig.__dataclass_fields__}
        branches: dict[str, TokenMixer] = {}
        for name, fields in settings.items():
            cls = get(fields.get("mixer", name))
            own = {k: v for k, v in fields.items() if k != "mixer"}
            if fixed := own.keys() & SHARED_FIELDS:
                raise ConfigError(
                    f"branch {name!r} sets {', '.join(sorted(fixed))}, which the gated mixer's own config sets."
                )
            # Outputs of separate o_proj are summed, so one bias is enough.
            bias = {"out_bias": config.out_bias and not branches}
            branch_config = cls.config_class.from_dict({**common, **bias, **own})
            branches[name] = cls(branch_config, projections=projections and not config.share_projections)
        self.branches: dict[str, TokenMixer] = nn.ModuleDict(branches)  # type: ignore[assignment]
        weights = len(branches) - 1
        self.gate = nn.Linear(config.dim, weights * (self.num_heads if config.gate == "head" else 1))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, config.gate_bias)
        if config.active is not None:
            self.set_active(config.active)

    @classmethod
    def branch_settings(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Return branch name → settings, as :class:`GatedConfig` holds them."""
        return config.branches

    def set_active(self, names: Iterable[str] | None) -> None:
        """Let only the named branches take part (None: all); kept in the config, so it is saved.

        Raises:
            ConfigError: A name is no branch, or none is given.
        """
        chosen = None if names is None else tuple(names)
        for name in chosen or ():
            if name not in self.branches:
                raise ConfigError(
                    f"no branch is called {name!r}.{near(name, self.branches)} Branches: {', '.join(self.branches)}."
                )
        if chosen == ():
            raise ConfigError(f"at least one branch must be active; branches: {', '.join(self.branches)}.")
        self.config = dataclasses.replace(self.config, active=chosen)

    def mix(self, x: Tensor, layout: TokenLayout, rotary: Rotary | None, state: MixerState | None) -> Tensor:
        """Project, mix and gate; see :meth:`TokenMixer.mix`."""
        shared = self.project(x) if self.config.share_projections else None
        outputs, weights = self._branches(x, shared, layout, rotary, state)
        if shared is not None:
            return self.o_proj(_mixed(outputs, weights).flatten(2))
        projected = [
            self.branches[name].o_proj((weights[name] * y).flatten(2)) for name, y in outputs.items()
        ]
        total = functools.reduce(torch.add, projected)
        first = next(iter(self.branches))
        bias = self.branches[first].o_proj.bias  # the one bias of all, as __init__ says
        return total if bias is None or first in outputs else total + bias

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
        """Mix with the projections of an enclosing gated mixer; see :meth:`TokenMixer.mix_heads`."""
        return _mixed(*self._branches(x, (q, k, v), layout, rotary, state)), None

    @property
    def averages(self) -> bool:
        """Whether the branches share their projections, and those that take part average."""
        return self.config.share_projections and all(branch.averages for _, branch in self._active())

    def weigh_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        queries: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
    ) -> Tensor:
        """Gate the branches' weights; see :meth:`TokenMixer.weigh_heads`."""
        weights = {
            name: branch.weigh_heads(x, q, k, queries, layout, rotary) for name, branch in self._active()
        }
        absent = {name: ~w.any(3).any(1) for name, w in weights.items()}
        gates = self._weights(at(x, queries), weights, absent)
        return functools.reduce(torch.add, (gates[name].transpose(1, 2) * w for name, w in weights.items()))

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MixerState:
        """Return the states of all branches, named ``branch.tensor``."""
        return {
            f"{name}.{key}": tensor
            for name, branch in self.branches.items()
            for key, tensor in branch.init_state(batch_size, dtype, device).items()
        }

    def prepare(self, layout: TokenLayout, *, cached: bool = False) -> None:
        """Make the tables of all active branches; see :meth:`TokenMixer.prepare`."""
        for _, branch in self._active():
            branch.prepare(layout, cached=cached)

    def _active(self) -> list[tuple[str, TokenMixer]]:
        """Name and mixer of the branches that take part."""
        chosen = self.config.active
        return [(name, branch) for name, branch in self.branches.items() if chosen is None or name in chosen]

    def _branches(
        self,
        x: Tensor,
        shared: tuple[Tensor, Tensor, Tensor] | None,
        layout: TokenLayout,
        rotary: Rotary | None,
        state: MixerState | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs of the active branches, and their weights."""
        outputs: dict[str, Tensor] = {}
        absent: dict[str, Tensor | None] = {}
        for name, branch in self._active():
            own = None if state is None else _substate(state, name)
            q, k, v = branch.project(x) if shared is None else shared
            outputs[name], covered = branch.mix_heads(x, q, k, v, layout, rotary, own)
            absent[name] = None if covered is None else ~covered
            if state is not None and own is not None:
                state.update({f"{name}.{key}": tensor for key, tensor in own.items()})
        return outputs, self._weights(x, outputs, absent)

    def _weights(
        self, x: Tensor, outputs: Iterable[str], absent: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Softmax over the branches present at a token, the last branch's logit being 0; [B, N, H or 1, 1]."""
        logits = self.gate(x).unflatten(-1, (len(self.branches) - 1, -1)).unbind(2)
        by_branch = dict(zip(self.branches, (*logits, torch.zeros_like(logits[0]))))
        rows = []
        for name in outputs:
            logit, mask = by_branch[name], absent[name]
            # Finite, so that a token that no branch covers gets no NaN.
            rows.append(
                logit if mask is None else logit.masked_fill(mask[..., None], torch.finfo(logit.dtype).min)
            )
        weights = torch.stack(rows, dim=2).softmax(dim=2)[..., None]
        return dict(zip(outputs, weights.unbind(2)))


def _mixed(outputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return weighted_sum(list(outputs.values()), [weights[name] for name in outputs])


def _substate(state: MixerState, name: str) -> MixerState:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
