"""An attention implementation that builds no mask, for decoders without attention layers."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import AttentionInterface, AttentionMaskInterface

NAME = "linmu"


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask: mixers read padding from the layout, so nothing of size N×N is made."""


def _no_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"attn_implementation={NAME!r} is for decoders whose attention layers are all replaced; "
        "choose 'sdpa' or another for this model."
    )


AttentionInterface.register(NAME, _no_attention)
AttentionMaskInterface.register(NAME, _no_mask)
