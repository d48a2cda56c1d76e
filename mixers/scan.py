"""Scan orders of a vision grid: Rotary Major Scan (LinGen, arXiv 2412.09856; LinMU, arXiv 2601.01322)."""

from __future__ import annotations

from mixers.errors import ConfigError

ROTARY_MAJOR_SCAN: tuple[str, ...] = ("thw", "twh", "hwt", "wht")
"""Axes from slowest to fastest; layer ℓ reads every clip in entry ℓ mod 4."""


def scan_axes(scan: str, layer_idx: int) -> str:
    """Return the axes, slowest first, in which layer ``layer_idx`` reads a clip.

    Args:
        scan: ``"raster"`` (always (t, h, w)) or ``"rms"`` (Rotary Major Scan).
        layer_idx: Index of the layer.

    Raises:
        ConfigError: Another scan.
    """
    if scan == "raster":
        return "thw"
    if scan == "rms":
        return ROTARY_MAJOR_SCAN[layer_idx % len(ROTARY_MAJOR_SCAN)]
    raise ConfigError(f"scan must be 'raster' or 'rms', found {scan!r}.")
