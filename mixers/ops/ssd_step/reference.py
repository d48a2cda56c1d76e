"""One token of the SSD scan in plain torch."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from mixers.errors import ShapeError
from mixers.ops.finish.reference import finish
from mixers.ops.ssd.chunks import divided, with_ones
from mixers.precision import without_autocast


def ssd_step(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    denominator: bool = False,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    """Advance the forward scan by one text token, updating ``state`` in place.

    Args:
        c: [B, H, K].
        b: [B, G, K], H a multiple of G; query head h reads KV head h // (H/G).
        x: [B, G, P].
        decay: (log_a, dt), each [B, E] with E = G or H.
        state: [B, E, K, P (+1)], as :func:`mixers.ops.ssd` returns it.
        denominator: As for :func:`mixers.ops.ssd`.
        skip: [H], as for :func:`mixers.ops.finish`, which is applied to y. None: zeros.
        norm_weight: [H, P], as for :func:`mixers.ops.finish`.
        norm_eps: As for :func:`mixers.ops.finish`.
        gate: [B, H, P], as for :func:`mixers.ops.finish`.

    Returns:
        y [B, H, P] in x's dtype.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    check(c, b, x, decay, state, denominator, skip, norm_weight, gate)
    log_a, dt = (t.to(state.dtype) for t in decay)
    heads = state.shape[1]
    keys, values = (
        t.to(state.dtype).repeat_interleave(heads // t.shape[1], dim=1)
        for t in (b, with_ones(x, denominator))
    )
    state.mul_(log_a.exp()[..., None, None]).add_((dt[..., None] * keys)[..., None] * values[:, :, None])
    grouped = rearrange(c.to(state.dtype), "b (e r) k -> b e r k", e=heads)
    with without_autocast(c.device):
        y = rearrange(grouped @ state, "b e r p -> b (e r) p")
    y = divided(y, denominator)
    if skip is None:
        skip = y.new_zeros(y.shape[1])
    gate = None if gate is None else gate[:, None]
    y = finish(y[:, None], x[:, None], skip, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate)
    return y[:, 0].to(x.dtype)


def check(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    state: Tensor,
    denominator: bool,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Raise ShapeError unless the arguments of :func:`ssd_step` fit each other."""
    (batch, heads, width), (groups, values) = c.shape, x.shape[1:]
    shape = (batch, decay[0].shape[-1], width, values + denominator)
    wanted = {
        "b": (b, (batch, groups, width)),
        "x": (x, (batch, groups, values)),
        "log_a": (decay[0], shape[:2]),
        "dt": (decay[1], shape[:2]),
        "state": (state, shape),
        "skip": (skip, (heads,)),
        "norm_weight": (norm_weight, (heads, values)),
        "gate": (gate, (batch, heads, values)),
    }
    wrong = [f"{k} {list(t.shape)}" for k, (t, want) in wanted.items() if t is not None and t.shape != want]
    if wrong or heads % groups or shape[1] not in (groups, heads):
        raise ShapeError(
            "b must be [B, G, K], x [B, G, P], log_a and dt [B, G or H], state [B, G or H, K, P (+1)], skip [H], "
            f"norm_weight [H, P] and gate [B, H, P] for c [B, H, K] = {list(c.shape)} and {groups} KV heads; "
            f"found {', '.join(wrong) or f'{shape[1]} decays'}."
        )
