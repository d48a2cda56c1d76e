"""Frames of a video told from images by the text before them, where the model is told nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridges.families.vision import Run, warn_once

_LONGEST_CAPTION, _LONGEST_NUMBER = 32, 6


def captioned_alike(ids: Sequence[int], runs: Sequence[Run], ends: Sequence[int]) -> list[list[int]]:
    """Group runs whose captions differ in a number alone, as those of a video's frames do.

    Args:
        ids: The row.
        runs: The runs that may be frames, in order.
        ends: For each run, where the run of vision tokens before it ends; 0 for the first.

    Returns:
        Groups of indices of ``runs``, in order.
    """
    groups: list[list[int]] = []
    for index, (start, _) in enumerate(runs):
        if index and ends[index] == runs[index - 1][1]:
            before, caption = ids[ends[index - 1] : runs[index - 1][0]], ids[ends[index] : start]
            second = len(groups[-1]) == 1
            if _numbered_alike(before, caption) if second else _same_but_for_a_number(before, caption):
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _same_but_for_a_number(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two captions are the same, or differ in one short stretch."""
    shorter, longer = sorted((len(one), len(other)))
    head = _common(one, other)
    tail = min(_common(one[::-1], other[::-1]), shorter - head)
    return longer - shorter <= 1 and longer - head - tail <= _LONGEST_NUMBER


def _numbered_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two captions end in ``word number sign``, the same but for the number.

    What stands before the first caption may be any text.
    """
    first, second = first[::-1], second[::-1]
    same = _common(first, second)
    if same < 2 or len(second) > _LONGEST_CAPTION:
        return False
    spans = ((same + n, same + m) for n in range(1, _LONGEST_NUMBER + 1) for m in (n, n + 1))
    return any(a < len(first) and b < len(second) and first[a] == second[b] for a, b in spans)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def warn_frames(config: Any) -> None:
    """Warn that images were taken for the frames of a video."""
    warn_once(
        config,
        "frames of a video are told from images by their captions alone, so images whose captions differ only in "
        "a number are read as one video",
    )
