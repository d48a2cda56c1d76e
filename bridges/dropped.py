"""What a mixer does not carry of the teacher's attention: said in the report, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridges.errors import UnsupportedAttentionError
from bridges.families import Family
from mixers import TokenMixer
from mixers.attention import Attention
from mixers.gated import Gated
from mixers.sliding_window import SlidingWindow


def dropped(mixer: TokenMixer, attention: Any, family: Family) -> list[str]:
    """Name what this attention does or holds that the mixer will not.

    Args:
        mixer: The mixer that takes its place.
        attention: The teacher's attention module.
        family: Its family.

    Raises:
        UnsupportedAttentionError: The mixer is ``attention``, and would not be the twin that it claims to be.
    """
    lost = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in family.weights]
    window = family.window(attention)
    kept = mixer.config.window if isinstance(mixer, Attention | SlidingWindow) else None
    if window is not None and window != kept:
        lost.append(f"sliding window of {window}")
    softcap = family.softcap(attention)
    if softcap is not None:
        without = [
            name for name, part in _parts(mixer) if part.config.softcap != softcap or not part.uses_softcap
        ]
        if without == [""]:
            lost.append(f"soft-cap of {softcap:g}")
        elif without:
            lost.append(f"soft-cap of {softcap:g} in {', '.join(without)}")
    lost += family.dropped(attention, mixer)
    if lost and isinstance(mixer, Attention):
        raise UnsupportedAttentionError(
            f"layer {attention.layer_idx} cannot become 'attention', the exact twin of the teacher's, which has no "
            f"{', no '.join(lost)}. Leave the layer out by layers=, or take another mixer, whose report lists what "
            "it drops."
        )
    return lost + family.dropouts(attention)


def _parts(mixer: TokenMixer, name: str = "") -> Iterator[tuple[str, TokenMixer]]:
    """Yield the branches of a gated mixer, by their names, or the mixer itself."""
    if not isinstance(mixer, Gated):
        yield name, mixer
        return
    for branch_name, branch in mixer.branches.items():
        yield from _parts(branch, f"{name}.{branch_name}" if name else branch_name)
