"""Where each token stands: validity, sequence, clip and grid coordinates, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixers.blocks import Blocks, composite, recent_blocks, window_blocks
from mixers.errors import LayoutError

Grid = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Scan:
    """A reading order of the tokens, and their tables in that order.

    Attributes:
        order: [B, N], ``order[b, s]`` is the token read at step s; None where it is the identity.
        inverse: [B, N], the step at which a token is read; None likewise.
        valid: bool [B, N] by step, or None where every step is valid.
        sequence: [B, N] by step, non-decreasing, padding included; None where a row is one sequence.
        vision: bool [B, N] by step; None where there is no vision.
        extent: [B, N] by step: the clip whose extent covers the step, -1 where none; None likewise.
        run: [B, N] by step: a number that changes at every edge (padding, sequence, clip) that a
            short convolution must not cross; None where there is no edge.
    """

    order: Tensor | None
    inverse: Tensor | None
    valid: Tensor | None
    sequence: Tensor | None
    vision: Tensor | None
    extent: Tensor | None
    run: Tensor | None


class TokenLayout:
    """Says of B rows of N tokens which are padding, which sequence they are of, and where vision stands.

    A *clip* is one image or one video; its *extent* is the span of its row from its first token to
    its last, and text may stand inside it.

    **The law of causality.** Output i may depend on token j only if both are valid, in the same
    sequence, and j < end(i): the end of the clip extent that covers i, or i + 1 where none does.

    What mixers ask for (scan orders, windows, block tables) is computed once and kept, so one layout
    serves all layers. It is passed as an argument, pickles, and has :meth:`to`.

    Args:
        batch_size: Rows B.
        length: Tokens N of a row.
        valid: bool [B, N]; False is padding. None: all valid.
        sequence: int [B, N], non-decreasing over the valid tokens of a row. None: one a row.
        clip: int [B, N]: clip number, unique in its row; -1 is text. None: no vision.
        coords: int [B, N, 3]: (t, h, w) of vision tokens; required with ``clip``.
        device: Device of the tables. Default: that of the tensors given, else CPU.

    Raises:
        LayoutError: A table has another shape, clips overlap or cross a sequence, a vision token is
            padding, or coordinates are negative or repeated within a clip.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        *,
        valid: Tensor | None = None,
        sequence: Tensor | None = None,
        clip: Tensor | None = None,
        coords: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        given = [t for t in (valid, sequence, clip, coords) if t is not None]
        self.batch_size, self.length = batch_size, length
        self.device = _concrete(device if device is not None else given[0].device if given else "cpu")
        valid, sequence, clip, coords = (
            None if t is None else t.to(self.device) for t in (valid, sequence, clip, coords)
        )
        for name, table in (("valid", valid), ("sequence", sequence), ("clip", clip), ("coords", coords)):
            want = (batch_size, length, 3) if name == "coords" else (batch_size, length)
            if table is not None and tuple(table.shape) != want:
                raise LayoutError(f"{name} must be {list(want)}, found {list(table.shape)}.")
        if (clip is None) != (coords is None):
            raise LayoutError("clip and coords come together; one of them is missing.")
        if valid is not None:
            valid = valid.bool()
            valid = None if bool(valid.all()) else valid
        if clip is not None and not bool((clip >= 0).any()):
            clip = coords = None
        self.valid = valid
        self.sequence = None if sequence is None else _contiguous_sequences(sequence.long(), valid)
        self.clip = None if clip is None else clip.long().clamp_min(-1)
        self.coords = None if coords is None else coords.long()
        self._memo: dict[Any, Any] = {}
        if self.clip is not None:
            self._check_clips()

    @classmethod
    def text(cls, batch_size: int, length: int, *, device: torch.device | str | None = None) -> TokenLayout:
        """Lay out rows that are one valid text sequence each."""
        return cls(batch_size, length, device=device)

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> TokenLayout:
        """Lay out text rows padded on either side; ``attention_mask`` [B, N] is non-zero at tokens."""
        if attention_mask.ndim != 2:
            raise LayoutError(f"attention_mask must be [B, N], found {list(attention_mask.shape)}.")
        return cls(*attention_mask.shape, valid=attention_mask != 0, device=attention_mask.device)

    @classmethod
    def packed(cls, cu_seqlens: Tensor | Sequence[int]) -> TokenLayout:
        """Lay out one row that holds several text sequences.

        Args:
            cu_seqlens: [S + 1] cumulative lengths, from 0 to N.
        """
        bounds = torch.as_tensor(cu_seqlens)
        if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[0]) != 0 or bool((bounds.diff() < 0).any()):
            raise LayoutError(f"cu_seqlens must rise from 0, found {bounds.tolist()}.")
        lengths = bounds.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)
        return cls(1, len(sequence), sequence=sequence[None], device=bounds.device)

    @classmethod
    def from_grids(
        cls,
        length: int,
        clips: Sequence[Sequence[tuple[int, Grid]]],
        *,
        valid: Tensor | None = None,
        sequence: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> TokenLayout:
        """Lay out rows whose clips are full grids in raster order.

        Args:
            length: Tokens N of a row.
            clips: For each row, its clips as (first token, (T, H, W)), each T·H·W tokens long.
            valid: bool [B, N], as for the class.
            sequence: int [B, N], as for the class.
            device: Device of the tables.

        Raises:
            LayoutError: A clip is empty, leaves its row, or meets another.
        """
        batch_size = len(clips)
        clip = torch.full((batch_size, length), -1)
        coords = torch.zeros(batch_size, length, 3, dtype=torch.long)
        for row, row_clips in enumerate(clips):
            for number, (start, grid) in enumerate(row_clips):
                size = grid[0] * grid[1] * grid[2]
                if min(grid) < 1 or start < 0 or start + size > length:
                    raise LayoutError(
                        f"row {row}: a clip of grid {tuple(grid)} at token {start} does not fit a row of {length}."
                    )
                if bool((clip[row, start : start + size] >= 0).any()):
                    raise LayoutError(f"row {row}: clip {number} at token {start} overlaps another clip.")
                clip[row, start : start + size] = number
                coords[row, start : start + size] = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)
        if device is None and valid is not None:
            device = valid.device
        return cls(
            batch_size, length, valid=valid, sequence=sequence, clip=clip, coords=coords, device=device
        )

    @property
    def padding(self) -> Tensor | None:
        """Bool [B, N], True at padding; None where there is none."""
        valid = self.valid
        return None if valid is None else self.kept("padding", lambda: ~valid)

    @property
    def vision(self) -> Tensor | None:
        """Bool [B, N], True at vision tokens; None where there are none."""
        clip = self.clip
        return None if clip is None else self.kept("vision", lambda: clip >= 0)

    @property
    def extent(self) -> Tensor | None:
        """Int [B, N]: the clip whose extent covers a token, -1 where none; None without vision."""
        return None if self.clip is None else self.kept("extent", self._extent)

    @property
    def end(self) -> Tensor:
        """Int [B, N]: end(i) of the law of causality."""
        return self.kept("end", self._end)

    @property
    def rank(self) -> Tensor:
        """Int [B, N]: how many valid tokens of its sequence stand before a token."""
        return self.kept("rank", self._rank)

    @property
    def number(self) -> Tensor:
        """Int [B, N]: which sequence of its row a token is of, from 0 up."""
        return self.kept("number", self._number)

    def leading(self, count: int) -> Tensor:
        """Return where the first valid tokens of each sequence stand in their row.

        Returns:
            int [B, S, count], S being the most sequences of a row; -1 where there are fewer tokens.
        """
        return self.kept(("leading", count), lambda: self._leading(count))

    def scan(self, axes: str = "thw") -> Scan:
        """Return the reading order in which each clip is read along ``axes``, slowest first.

        Vision tokens permute among their clip's own slots; text and padding stay.

        Args:
            axes: A permutation of ``"thw"``, as :func:`mixers.scan.scan_axes` gives.
        """
        return self.kept(("scan", axes), lambda: self._scan(axes))

    def windows(self, size: Grid, shifted: bool = False, *, history: int = 0) -> Blocks | None:
        """Cut each clip into 3-D windows; None without vision.

        Args:
            size: Window extent in tokens along (t, h, w).
            shifted: Whether the cuts are moved by half a window. Windows at the border are then
                smaller; nothing wraps around (unlike Swin's cyclic shift).
            history: Slots that stand before the row's first token; keys index rows of ``history + N``.
        """
        if self.clip is None:
            return None
        return self.kept(("windows", size, shifted, history), lambda: self._windows(size, shifted, history))

    def recent(self, window: int, *, text_only: bool, history: int = 0) -> Blocks | None:
        """Group tokens with the last ``window`` valid tokens up to each, themselves included.

        Args:
            window: Tokens a query looks at.
            text_only: Whether vision tokens are left out as queries (they remain as keys).
            history: Slots that stand before the row's first token, most recent last, and belong
                to its first sequence; keys index rows of ``history + N``.

        Returns:
            The table, or None where no token is a query.
        """
        key = ("recent", window, text_only, history, torch.is_grad_enabled())
        return self.kept(key, lambda: self._recent(window, text_only, history))

    def kept(self, key: Any, compute: Callable[[], T]) -> T:
        """Return what ``compute`` gives, which must follow from the layout and the key: called once, and kept."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def to(self, device: torch.device | str) -> TokenLayout:
        """Return the layout on another device (itself if it is there)."""
        if _concrete(device) == self.device:
            return self
        moved = object.__new__(TokenLayout)
        moved.batch_size, moved.length, moved.device = self.batch_size, self.length, _concrete(device)
        for name in ("valid", "sequence", "clip", "coords"):
            table = getattr(self, name)
            setattr(moved, name, None if table is None else table.to(device))
        moved._memo = {}
        return moved

    def select(self, rows: Tensor | None = None, tokens: slice = slice(None)) -> TokenLayout:
        """Return the layout of some rows and a span of their tokens.

        Args:
            rows: int [B'] row indices, repeats allowed. None: all rows.
            tokens: Contiguous span, which must not cut a clip.

        Raises:
            LayoutError: The span cuts through a clip's extent.
        """
        start, stop, step = tokens.indices(self.length)
        if step != 1:
            raise LayoutError(f"tokens must be contiguous, found step {step}.")
        if self.extent is not None:
            for cut in (start, stop):
                if 0 < cut < self.length and bool(
                    ((self.extent[:, cut - 1] >= 0) & (self.extent[:, cut - 1] == self.extent[:, cut])).any()
                ):
                    raise LayoutError(
                        f"a cut at token {cut} goes through a clip; prefill in chunks that end between clips."
                    )
        tables = {
            name: table if rows is None else table[rows.to(table.device)]
            for name in ("valid", "sequence", "clip", "coords")
            if (table := getattr(self, name)) is not None
        }
        batch_size = self.batch_size if rows is None else len(rows)
        return TokenLayout(
            batch_size,
            max(stop - start, 0),
            **{name: t[:, start:stop] for name, t in tables.items()},
            device=self.device,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}

    def __repr__(self) -> str:
        clips = 0 if self.clip is None else len(torch.unique(self._flat_clip()[self.clip >= 0]))
        return (
            f"TokenLayout(batch_size={self.batch_size}, length={self.length}, clips={clips}, "
            f"padded={self.valid is not None}, packed={self.sequence is not None}, device={self.device})"
        )

    def _positions(self) -> Tensor:
        return torch.arange(self.length, device=self.device).expand(self.batch_size, -1)

    def _flat_clip(self) -> Tensor:
        """Clip numbers made unique over all rows [B, N]; meaningful at vision tokens."""
        assert self.clip is not None
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        return rows * (int(self.clip.max()) + 1) + self.clip

    def _vision_groups(self) -> tuple[Tensor, Tensor]:
        """Flat indices of the vision tokens, and for each the rank of its clip in reading order."""
        assert self.clip is not None
        tokens = (self.clip >= 0).flatten().nonzero().flatten()
        clip = self._flat_clip().flatten()[tokens]
        change = torch.ones_like(clip, dtype=torch.bool)
        change[1:] = clip[1:] != clip[:-1]
        return tokens, change.cumsum(0) - 1

    def _check_clips(self) -> None:
        assert self.clip is not None
        assert self.coords is not None
        vision = self.clip >= 0
        if self.valid is not None and bool((vision & ~self.valid).any()):
            raise LayoutError("a vision token stands at padding; mark it valid or take it out of its clip.")
        tokens, group = self._vision_groups()
        clip = self._flat_clip().flatten()[tokens]
        if int(group[-1]) + 1 != len(torch.unique(clip)):
            raise LayoutError(
                "two clips interleave; the tokens of a clip may have text between them, no other clip."
            )
        coords = self.coords.flatten(0, 1)[tokens]
        if bool((coords < 0).any()):
            raise LayoutError("coords of vision tokens must not be negative.")
        key = composite(group, coords)
        if len(torch.unique(key)) != len(key):
            raise LayoutError(
                "two tokens of one clip have the same (t, h, w); coords must differ within a clip."
            )
        if self.sequence is not None:
            sequence = self.sequence.flatten()[tokens]
            if bool(((group[1:] == group[:-1]) & (sequence[1:] != sequence[:-1])).any()):
                raise LayoutError("a clip crosses from one packed sequence into another.")

    def _extent(self) -> Tensor:
        """A slot is covered by the last clip begun before it if that clip goes on after it."""
        assert self.clip is not None
        at, vision = self._positions(), self.clip >= 0
        before = torch.where(vision, at, -1).cummax(1).values
        after = torch.where(vision, at, self.length).flip(1).cummin(1).values.flip(1)
        covered = (before >= 0) & (after < self.length)
        previous = self.clip.gather(1, before.clamp_min(0))
        following = self.clip.gather(1, after.clamp_max(self.length - 1))
        return torch.where(covered & (previous == following), previous, -1)

    def _end(self) -> Tensor:
        after = self._positions() + 1
        extent = self.extent
        if extent is None:
            return after.clone()
        numbers = int(extent.max()) + 1
        ends = torch.zeros(self.batch_size, numbers + 1, dtype=torch.long, device=self.device)
        ends.scatter_reduce_(1, extent + 1, after, "amax")
        return torch.where(extent >= 0, ends.gather(1, extent + 1), after)

    def _number(self) -> Tensor:
        number = torch.zeros(self.batch_size, self.length, dtype=torch.long, device=self.device)
        if self.sequence is not None:
            number[:, 1:] = (self.sequence[:, 1:] != self.sequence[:, :-1]).cumsum(1)
        return number

    def _rank(self) -> Tensor:
        valid = torch.ones_like(self._positions()) if self.valid is None else self.valid.long()
        before = valid.cumsum(1) - valid
        if self.sequence is None:
            return before
        starts = self.number.diff(dim=1, prepend=self.number.new_full((self.batch_size, 1), -1)) > 0
        return before - before.masked_fill(~starts, 0).cummax(1).values

    def _leading(self, count: int) -> Tensor:
        sequences = int(self.number.max()) + 1 if self.sequence is not None and self.length else 1
        leads = self.rank < count
        if self.valid is not None:
            leads = leads & self.valid
        # What does not lead is put into one more slot, which is left out.
        slot = torch.where(leads, self.number * count + self.rank, sequences * count)
        table = torch.full((self.batch_size, sequences * count + 1), -1, device=self.device)
        table.scatter_(1, slot, self._positions())
        return table[:, :-1].view(self.batch_size, sequences, count)

    def _scan(self, axes: str) -> Scan:
        if sorted(axes) != ["h", "t", "w"]:
            raise LayoutError(f"axes must be a permutation of 'thw', found {axes!r}.")
        order = inverse = None
        if self.coords is not None:
            tokens, group = self._vision_groups()
            coords = self.coords.flatten(0, 1)[tokens][:, ["thw".index(a) for a in axes]]
            flat = torch.arange(self.batch_size * self.length, device=self.device)
            flat[tokens] = tokens[composite(group, coords).argsort(stable=True)]
            order = flat.view(self.batch_size, -1) % self.length
            inverse = torch.empty_like(order).scatter_(1, order, self._positions())
            if bool((order == self._positions()).all()):
                order = inverse = None
        # Slots of a clip hold tokens of that clip in every order, so tables by slot are tables by step.
        return Scan(
            order, inverse, self.valid, self.sequence, self.vision, self.extent, self.kept("run", self._run)
        )

    def _run(self) -> Tensor | None:
        tables = [t for t in (self.valid, self.sequence, self.clip) if t is not None]
        if not tables:
            return None
        change = torch.zeros(self.batch_size, self.length, dtype=torch.bool, device=self.device)
        for table in tables:
            change[:, 1:] |= table[:, 1:] != table[:, :-1]
        return change.cumsum(1)

    def _windows(self, size: Grid, shifted: bool, history: int) -> Blocks:
        assert self.coords is not None
        tokens, group = self._vision_groups()
        coords, shape = self.coords.flatten(0, 1)[tokens], (self.batch_size, self.length)
        return window_blocks(tokens, group, coords, size, shifted, shape=shape, history=history)

    def _recent(self, window: int, text_only: bool, history: int) -> Blocks | None:
        valid = self.valid if self.valid is not None else torch.ones_like(self._positions(), dtype=torch.bool)
        query = valid & (self.clip < 0) if text_only and self.clip is not None else valid
        return recent_blocks(valid, query, self.sequence, window, history=history)


def _concrete(device: torch.device | str) -> torch.device:
    """Return the device as tensors name it: ``cuda`` becomes ``cuda:0``."""
    return torch.empty(0, device=device).device


def _contiguous_sequences(sequence: Tensor, valid: Tensor | None) -> Tensor:
    """Give padding the number of the sequence before it (or after, at the start of a row)."""
    if valid is not None:
        lowest = sequence.min() - 1
        filled = torch.where(valid, sequence, lowest).cummax(1).values
        first = torch.where(valid, sequence, sequence.max()).min(1, keepdim=True).values
        filled = torch.where(filled == lowest, first, filled)
        kept = torch.where(valid, sequence, filled)
    else:
        filled = kept = sequence
    if bool((kept.diff(dim=1) < 0).any()):
        raise LayoutError("sequence numbers must not fall along a row; number packed sequences in order.")
    return filled
