"""Slow definitions, written from the formulas, that the fast code must equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.mixers.strategies import Rows


def reading_order(rows: Rows, axes: str) -> Tensor:
    """[B, N]: each clip's tokens, sorted along ``axes`` (slowest first), in the clip's own slots."""
    batch, length = rows.shape
    order = np.tile(np.arange(length), (batch, 1))
    for row in range(batch):
        clip, coords = rows.clip[row].numpy(), rows.coords[row].numpy()
        for number in np.unique(clip[clip >= 0]):
            slots = np.flatnonzero(clip == number)
            keys = [coords[slots, "thw".index(axis)] for axis in reversed(axes)]
            order[row, slots] = slots[np.lexsort(keys)]
    return torch.from_numpy(order)


def dense_ssd(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    backward_decay: tuple[Tensor, Tensor] | None,
    rows: Rows,
    axes: str = "thw",
    *,
    denominator: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two sums of the SSD scan over an explicit [N, N] matrix of weights, and the last state.

    y_i = Σ_{j ≤ i} (Π_{k=j+1..i} a_k) dt_j (c_i·b_j) x_j
        + [i is vision] Σ_{j > i, same clip} (Π_{k=i..j-1} a'_k) dt'_j (c_i·b_j) x_j
    """
    heads, decays, length = c.shape[2], decay[0].shape[2], c.shape[1]
    ys, states = [], []
    for row, order in enumerate(reading_order(rows, axes)):
        valid, sequence, clip = (t[row][order] for t in (rows.valid, rows.sequence, rows.clip))
        vision = clip >= 0

        def per_head(t: Tensor, row: int = row, order: Tensor = order) -> Tensor:
            return t[row][order].repeat_interleave(heads // t.shape[2], dim=1)

        q, k, v = (per_head(t) for t in (c, b, x))
        if denominator:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        i, j, between = torch.meshgrid(*[torch.arange(length)] * 3, indexing="ij")

        def weigh(pair: tuple[Tensor, Tensor], real: Tensor, product: Tensor, pairs: Tensor) -> Tensor:
            log_a, dt = (per_head(t) * real[:, None] for t in pair)
            weight = torch.einsum("ijm,mh->ijh", product.to(log_a), log_a).exp() * dt[None]
            return weight * pairs[..., None]

        together = (sequence[:, None] == sequence) & valid[:, None] & valid
        steps = torch.arange(length)
        causal = together & (steps <= steps[:, None])
        weight = weigh(decay, valid, (between > j) & (between <= i), causal)
        if backward_decay is not None:
            later = (clip[:, None] == clip) & vision & (steps > steps[:, None])
            weight = weight + weigh(backward_decay, vision, (between >= i) & (between < j), later)
        y = torch.einsum("ijh,ihk,jhk,jhp->ihp", weight, q, k, v)

        last = int(valid.nonzero().max()) if valid.any() else -1
        state = torch.zeros(heads, k.shape[2], v.shape[2], dtype=c.dtype)
        if last >= 0:
            reach = weigh(decay, valid, (between > j) & (between <= i), causal)[last]
            state = torch.einsum("jh,jhk,jhp->hkp", reach, k, v)
        if initial_state is not None:
            start = initial_state[row].repeat_interleave(heads // decays, dim=0)
            first = sequence == sequence[valid][0] if last >= 0 else valid
            faded = (per_head(decay[0]) * valid[:, None]).cumsum(0).exp() * (first & valid)[:, None]
            y = y + torch.einsum("ih,ihk,hkp->ihp", faded, q, start)
            state = state + (start if last < 0 else faded[last][:, None, None] * start)
        if denominator:
            y = y[..., :-1] / y[..., -1:].clamp_min(1e-6)
        ys.append(torch.empty_like(y).index_copy(0, order, y))
        states.append(state[:: heads // decays])
    return torch.stack(ys), torch.stack(states)


def naive_conv(x: Tensor, weight: Tensor, rows: Rows, axes: str = "thw") -> Tensor:
    """Sum over the taps one by one, stopping at the first edge met on the way back."""
    y = torch.zeros_like(x)
    taps = weight.shape[1]
    for row, order in enumerate(reading_order(rows, axes).tolist()):
        for step, token in enumerate(order):
            for back in range(taps):
                if step - back < 0:
                    break
                other = order[step - back]
                if any(t[row, other] != t[row, token] for t in (rows.valid, rows.clip)):
                    break
                if rows.valid[row, token] and rows.sequence[row, other] != rows.sequence[row, token]:
                    break
                y[row, token] += weight[:, taps - 1 - back] * x[row, other]
    return y


def same_window(rows: Rows, size: tuple[int, int, int], shifted: bool) -> Tensor:
    """Bool [B, N, N]: two vision tokens of one clip whose cells, cut every ``size`` tokens, are the same.

    A shifted grid of cells begins half a window before the origin and does not wrap.
    """
    cell = torch.stack(
        [
            torch.tensor([[(c + (s // 2 if shifted else 0)) // s for c in row] for row in axis.tolist()])
            for axis, s in zip(rows.coords.unbind(-1), size)
        ],
        dim=-1,
    )
    vision = rows.clip >= 0
    alike = (cell[:, :, None] == cell[:, None]).all(-1) & (rows.clip[:, :, None] == rows.clip[:, None])
    return alike & vision[:, :, None] & vision[:, None]


def first_tokens(rows: Rows, count: int) -> Tensor:
    """Bool [B, N, N]: j is one of the first ``count`` valid tokens of i's sequence, and not after i."""
    seen = torch.zeros(*rows.shape, rows.shape[1], dtype=torch.bool)
    for row, tokens in rows.tokens_of_sequences():
        for place, i in enumerate(tokens.tolist()):
            seen[row, i, tokens[: min(count, place + 1)]] = True
    return seen


def last_tokens(rows: Rows, window: int) -> Tensor:
    """Bool [B, N, N]: j is one of the last ``window`` valid tokens of i's sequence up to i."""
    seen = torch.zeros(*rows.shape, rows.shape[1], dtype=torch.bool)
    for row, tokens in rows.tokens_of_sequences():
        for place, i in enumerate(tokens.tolist()):
            seen[row, i, tokens[max(0, place - window + 1) : place + 1]] = True
    return seen


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Masked softmax over an [N, M] matrix; zero where a token sees nothing."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weight = scores.softmax(-1).masked_fill(~seen[:, None], 0)
    return torch.einsum("bhij,bjhp->bihp", weight, v)
