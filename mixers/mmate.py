"""The M-MATE block: Flex-MA and Local-Swin under one gate (LinMU, arXiv 2601.01322)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mixers.flex_ma import FlexMAConfig
from mixers.gated import GateConfig, Gated
from mixers.registry import register
from mixers.swin3d import Swin3DConfig, check_windows

SINKS = 4
"""Sinks beside a text window, as StreamingLLM has them (arXiv 2309.17453)."""


@dataclass(kw_only=True)
class MMateConfig(GateConfig, FlexMAConfig):
    """Settings of ``mmate``: those of the gate, of ``flex_ma`` and of ``swin3d``.

    Args:
        window: As for ``swin3d``.
        shift: As for ``swin3d``.
        memory: As for ``flex_ma``; long from the start, for the windows have what is near.
        text_window: As for ``swin3d``; 0 is the paper.
        sinks: As for ``swin3d``; 0 is the paper. None: 4 where there is a text window.
        gate_bias: The gate starts with 95 % on Local-Swin, which is the teacher's own attention as far as it reaches;
            0 is equal weights.
    """

    gate_bias: float = -3.0
    memory: tuple[float, float] = (512, 16384)
    window: tuple[int, int, int] = (4, 4, 4)
    shift: bool = True
    text_window: int = 512
    sinks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks is None:
            self.sinks = SINKS if self.text_window else 0
        check_windows(self.window, self.text_window, self.sinks)


@register("mmate", config=MMateConfig)
class MMate(Gated):
    """LinMU's replacement of a self-attention layer: y = g ⊙ FlexMA(x) + (1 - g) ⊙ LocalSwin(x)."""

    config: MMateConfig

    @classmethod
    def branch_settings(cls, config: MMateConfig) -> dict[str, dict[str, Any]]:
        """Split the settings between the two branches."""
        common = {f.name for f in fields(GateConfig)}
        split = {"flex_ma": FlexMAConfig, "local_swin": Swin3DConfig}
        settings: dict[str, dict[str, Any]] = {
            name: {f.name: getattr(config, f.name) for f in fields(kind) if f.name not in common}
            for name, kind in split.items()
        }
        settings["local_swin"]["mixer"] = "swin3d"
        return settings
