"""Random layouts: packed rows, padding on both sides, several clips, text inside clips, odd sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mixers import TokenLayout

SIZES = st.integers(1, 3)


@dataclass(frozen=True)
class Rows:
    """The tables of a layout, from which tests compute what they expect without asking the layout."""

    valid: Tensor
    sequence: Tensor
    clip: Tensor
    coords: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.valid.shape)  # type: ignore[return-value]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(
            *self.shape, valid=self.valid, sequence=self.sequence, clip=self.clip, coords=self.coords
        )

    def tokens_of_sequences(self) -> list[tuple[int, Tensor]]:
        """List (row, indices of the valid tokens) of every sequence."""
        return [
            (row, ((self.sequence[row] == number) & self.valid[row]).nonzero().flatten())
            for row in range(self.shape[0])
            for number in self.sequence[row][self.valid[row]].unique()
        ]

    def take(self, row: int, tokens: Tensor) -> Rows:
        """Return one unpadded row of the chosen tokens."""
        return Rows(*(t[row, tokens][None] for t in (self.valid, self.sequence, self.clip, self.coords)))

    def extents(self, row: int) -> list[tuple[int, int]]:
        """List the [start, end) spans of a row's clips."""
        spans = []
        for number in self.clip[row][self.clip[row] >= 0].unique():
            at = (self.clip[row] == number).nonzero().flatten()
            spans.append((int(at[0]), int(at[-1]) + 1))
        return spans

    def cuts(self) -> list[int]:
        """List where a prefill may be cut: outside the clips of every row."""
        spans = [span for row in range(self.shape[0]) for span in self.extents(row)]
        return [c for c in range(1, self.shape[1]) if not any(start < c < end for start, end in spans)]

    def dependencies(self) -> Tensor:
        """The law of causality, token by token: bool [B, N, N], may output i depend on token j?"""
        batch, length = self.shape
        allowed = torch.zeros(batch, length, length, dtype=torch.bool)
        for row in range(batch):
            ends = [
                next((end for start, end in self.extents(row) if start <= i < end), i + 1)
                for i in range(length)
            ]
            for i, j in itertools.product(range(length), repeat=2):
                both = bool(self.valid[row, i] and self.valid[row, j])
                together = bool(self.sequence[row, i] == self.sequence[row, j])
                allowed[row, i, j] = both and together and j < ends[i]
        return allowed


@st.composite
def clips(draw: st.DrawFn) -> list[tuple[int, int, int] | None]:
    """One clip as a list of coordinates, None where text stands inside it."""
    t, h, w = draw(st.one_of(st.just((1, 1, 1)), st.tuples(SIZES, SIZES, st.integers(1, 4))))
    first = draw(st.integers(0, 1))
    raster = list(itertools.product(range(first, first + t), range(h), range(w)))
    order = draw(st.sampled_from(["raster", "raster", "reversed", "shuffled"]))
    if order == "reversed":
        raster = raster[::-1]
    elif order == "shuffled":
        raster = draw(st.permutations(raster))
    every = draw(st.sampled_from([None, w, h * w]))
    if every is None:
        return list(raster)
    gap = draw(st.integers(1, 2))
    stream: list[tuple[int, int, int] | None] = []
    for place, token in enumerate(raster):
        if place and place % every == 0:
            stream += [None] * gap
        stream.append(token)
    return stream


@st.composite
def rows(
    draw: st.DrawFn,
    *,
    max_batch: int = 3,
    max_sequences: int = 2,
    padding: bool = True,
    vision: bool = True,
    holes: bool = False,
) -> Rows:
    """Draw the tables of a layout.

    Args:
        max_batch: Most rows.
        max_sequences: Most sequences packed into a row.
        padding: Whether rows are padded, on the left, the right, both and between sequences.
        vision: Whether there are clips.
        holes: Whether single text tokens, inside clips too, are made padding.
    """
    text = st.integers(1, 6).map(lambda n: [None] * n)
    piece = st.one_of(text, clips().map(tuple)) if vision else text
    sequence = st.lists(piece, min_size=1, max_size=3)
    batch = draw(
        st.lists(st.lists(sequence, min_size=1, max_size=max_sequences), min_size=1, max_size=max_batch)
    )
    pad = st.integers(0, 3) if padding else st.just(0)

    # A slot is (sequence, clip, coordinates), or None for padding.
    slots: list[list[tuple | None]] = []
    for sequences in batch:
        row: list[tuple | None] = []
        number = itertools.count(draw(st.integers(20, 21)), draw(st.sampled_from([2, -2])))
        for place, pieces in enumerate(sequences):
            if place:
                row += [None] * draw(pad)
            for tokens in pieces:
                clip = next(number) if isinstance(tokens, tuple) else -1
                row += [(3 + 2 * place, -1 if c is None else clip, c or (0, 0, 0)) for c in tokens]
        slots.append(row)
    if not padding:
        shortest = min(map(len, slots))
        slots = [row for row in slots if len(row) == shortest]
    length = max(map(len, slots)) + draw(pad)
    for row in slots:
        left = draw(st.integers(0, length - len(row)))
        row[:] = [None] * left + row + [None] * (length - len(row) - left)
        if holes:
            for place in draw(st.lists(st.integers(0, length - 1), max_size=3)):
                slot = row[place]
                row[place] = slot if slot is not None and slot[1] >= 0 else None

    empty = (0, -1, (0, 0, 0))
    filled = [[slot or empty for slot in row] for row in slots]
    return Rows(
        valid=torch.tensor([[slot is not None for slot in row] for row in slots]),
        sequence=torch.tensor([[s for s, _, _ in row] for row in filled]),
        clip=torch.tensor([[c for _, c, _ in row] for row in filled]),
        coords=torch.tensor([[x for _, _, x in row] for row in filled]),
    )
