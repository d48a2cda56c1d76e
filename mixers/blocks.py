"""Groups of queries and the keys that each group may look at: 3-D windows, and the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """Groups of queries and the keys that each group may look at, as gather tables.

    A token is the query of at most one slot. Without ``first``, a key stands in at most one slot too.

    Attributes:
        queries: int [M, Q] flat token indices b·N + i, -1 where a slot is empty.
        keys: int [M, K] flat indices into rows of ``history + N`` tokens, -1 where empty.
        first: int32 [M, Q]: the first key slot that a query looks at. None: every query of a group
            sees all of its keys.
        stop: int32 [M, Q]: one more than the last key slot that a query looks at; None likewise.
        count: How many slots of ``queries`` are filled, where that is known.
        idle: int [U] flat indices of the tokens that are no query, where they are known.
        transposed: The same pairs with the roles exchanged, its ``queries`` being every key that some
            query looks at. Gradients of keys are computed by it; where ``first`` is given, only a
            table made while gradients were enabled has it.
    """

    queries: Tensor
    keys: Tensor
    first: Tensor | None = None
    stop: Tensor | None = None
    count: int | None = None
    idle: Tensor | None = None
    transposed: Blocks | None = None

    @property
    def allowed(self) -> Tensor | None:
        """Bool [M, Q, K], True where a query looks at a key; None where each sees all. Not kept: it is large."""
        if self.first is None or self.stop is None:
            return None
        slot = torch.arange(self.keys.shape[1], device=self.keys.device)
        within = (slot >= self.first[..., None]) & (slot < self.stop[..., None])
        return within & (self.keys >= 0)[:, None]

    def __getitem__(self, groups: slice) -> Blocks:
        """Return the table of some of the groups."""
        first, stop = (None if t is None else t[groups] for t in (self.first, self.stop))
        return Blocks(self.queries[groups], self.keys[groups], first, stop)


def window_blocks(
    tokens: Tensor,
    clip: Tensor,
    coords: Tensor,
    size: Sequence[int],
    shifted: bool,
    *,
    shape: tuple[int, int],
    history: int = 0,
) -> Blocks:
    """Group the tokens of 3-D windows.

    Args:
        tokens: [V] flat indices of the vision tokens, rising.
        clip: [V] a number for each clip.
        coords: [V, 3] their (t, h, w).
        size: Window extent along (t, h, w).
        shifted: Whether the cuts are moved by half a window.
        shape: (B, N).
        history: Slots before each row's first token.
    """
    _, window, count = torch.unique(
        composite(clip, window_cells(coords, size, shifted)), return_inverse=True, return_counts=True
    )
    by_window = window.argsort(stable=True)
    place = torch.arange(len(tokens), device=tokens.device) - (count.cumsum(0) - count)[window[by_window]]
    members = torch.full((len(count), int(count.max())), -1, device=tokens.device)
    members[window[by_window], place] = tokens[by_window]
    queries = _narrow(members, shape[0] * shape[1])
    later = members + (members // shape[1] + 1) * history
    keys = (
        _narrow(later.masked_fill(members < 0, -1), shape[0] * (history + shape[1])) if history else queries
    )
    transposed = Blocks(keys, queries, count=len(tokens))
    looks = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=tokens.device).index_fill(
        0, tokens, True
    )
    return Blocks(queries, keys, count=len(tokens), idle=_absent(looks), transposed=transposed)


def window_cells(coords: Tensor, size: Sequence[int], shifted: bool) -> Tensor:
    """Return which window of its clip each token is in, along (t, h, w): of coordinates [.., 3], [.., 3]."""
    extent = torch.tensor(size, device=coords.device)
    return (coords + (extent // 2 if shifted else 0)) // extent


def recent_blocks(
    valid: Tensor, query: Tensor, sequence: Tensor | None, window: int, *, history: int = 0
) -> Blocks | None:
    """Group tokens with the last ``window`` valid tokens up to each, themselves included.

    Args:
        valid: bool [B, N].
        query: bool [B, N], the valid tokens that look.
        sequence: [B, N], non-decreasing. None: one a row.
        window: Tokens a query looks at.
        history: Slots before each row's first token, which belong to its first sequence.

    Returns:
        The table, or None where no token is a query.
    """
    if not bool(query.any()):
        return None
    batch, length = valid.shape
    # From here on a row is its history and then its valid tokens, each known by its place in that order.
    order = torch.cat(
        [
            torch.arange(history, device=valid.device).expand(batch, -1),
            (~valid).long().argsort(dim=1, stable=True) + history,
        ],
        dim=1,
    )
    held = torch.arange(history + length, device=valid.device) < history + valid.sum(1, keepdim=True)
    looks = held.clone()
    looks[:, :history] = False
    looks[:, history:] &= query.gather(1, order[:, history:] - history)
    start, end = _sequence_bounds(sequence, order, held, history)
    at = torch.arange(history + length, device=valid.device).expand(batch, -1)
    size = min(window, length)
    queries, keys, first, stop = _banded(
        looks,
        held,
        order,
        (at + 1 - window).maximum(start),
        at + 1,
        begin=history,
        size=size,
        reach=(1 - window, size),
    )
    row = queries // (history + length)
    tokens = (queries - (row + 1) * history).masked_fill(queries < 0, -1)
    transposed = None
    if torch.is_grad_enabled():
        until = (at + window).minimum(end)
        lookers = torch.nn.functional.pad(looks.cumsum(1), (1, 0))
        seen = held & (lookers.gather(1, until) > lookers.gather(1, at))
        size = min(window, history + length)
        reach = (0, size + window - 1)
        own, others, low, high = _banded(seen, looks, order, at, until, begin=0, size=size, reach=reach)
        row = others // (history + length)
        others = (others - (row + 1) * history).masked_fill(others < 0, -1)
        transposed = Blocks(
            _narrow(own, batch * (history + length)),
            _narrow(others, batch * length),
            low,
            high,
            count=int(seen.sum()),
        )
    return Blocks(
        _narrow(tokens, batch * length),
        _narrow(keys, batch * (history + length)),
        first,
        stop,
        count=int(query.sum()),
        idle=_absent(query),
        transposed=transposed,
    )


def composite(group: Tensor, coords: Tensor) -> Tensor:
    """Fold (group, a, b, c) into one integer with the same lexicographic order."""
    key = group
    for axis in coords.unbind(-1):
        key = key * (int(axis.max()) + 1) + axis
    return key


def _sequence_bounds(
    sequence: Tensor | None, order: Tensor, held: Tensor, history: int
) -> tuple[Tensor, Tensor]:
    """By place: where the sequence of a place begins, and one more than where it ends."""
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    edge = torch.zeros_like(held)
    if sequence is not None:
        by_place = sequence.gather(1, order[:, history:] - history)
        edge[:, history + 1 :] = by_place[:, 1:] != by_place[:, :-1]
    start = torch.where(edge, at, 0).cummax(1).values
    edge |= ~held
    after = torch.where(edge, at, order.shape[1]).flip(1).cummin(1).values.flip(1)
    end = torch.full_like(after, order.shape[1])
    end[:, :-1] = after[:, 1:]
    return start, end


def _banded(
    members: Tensor,
    others: Tensor,
    order: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    begin: int,
    size: int,
    reach: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut the places of a row into groups of ``size``, each with the places ``reach`` around its first.

    Args:
        members: bool [B, L], the places that are grouped.
        others: bool [B, L], the places that they may look at.
        order: [B, L], the slot of a place in its row.
        low: [B, L], the first place that a member looks at.
        high: [B, L], one more than the last.
        begin: The place where the first group begins.
        size: Places of a group.
        reach: From where to where the others of a group stand, relative to its first place.

    Returns:
        Members [M, Q] and others [M, K] as flat indices b·L + slot, -1 where empty, and the slots of
        others, from first to stop, that a member looks at, both [M, Q].
    """
    length = order.shape[1]
    flat = members.flatten().nonzero().flatten()
    row, place = flat // length, flat % length - begin
    groups = length // size + 1
    group, number = torch.unique(row * groups + place // size, return_inverse=True)

    def spread(values: Tensor, empty: int) -> Tensor:
        table = torch.full((len(group), size), empty, dtype=values.dtype, device=values.device)
        table[number, place % size] = values
        return table

    group_row, origin = group // groups, group % groups * size + begin
    at = origin[:, None] + torch.arange(*reach, device=order.device)
    inside = (at >= 0) & (at < length)
    at = at.clamp(0, length - 1)
    inside &= others[group_row[:, None], at]
    around = torch.where(inside, group_row[:, None] * length + order[group_row[:, None], at], -1)
    # Short rows and rare text fill few of the slots; the empty columns would be computed in vain.
    columns = inside.any(0).nonzero().flatten()
    left, right = int(columns[0]), int(columns[-1]) + 1
    base = origin[number] + reach[0] + left
    first = spread((low.flatten()[flat] - base).clamp_min(0).int(), 0)
    stop = spread((high.flatten()[flat] - base).clamp_max(right - left).int(), 0)
    own = spread(row * length + order.flatten()[flat], -1)
    asked = (own >= 0).any(0)
    return own[:, asked], around[:, left:right].contiguous(), first[:, asked], stop[:, asked]


def _absent(members: Tensor) -> Tensor:
    return _narrow((~members).flatten().nonzero().flatten(), members.numel())


def _narrow(table: Tensor, indices: int) -> Tensor:
    return table.int() if indices < 2**31 else table
