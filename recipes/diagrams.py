"""Pictures of how mixers read tokens, drawn from the library's own layouts and mixers.

``python -m recipes.diagrams docs/assets`` draws those of the docs; the functions draw any grid, window or row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixers import ROTARY_MAJOR_SCAN, Grid, TokenLayout, TokenMixer, build
from recipes.plots import COLOURS, INK, blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERMILION, BLUE, GREEN = COLOURS[:3]
PAPER, PALE = "#ffffff", "#e9edf1"
BACK, AHEAD = "#9db8cf", VERMILION
KINDS = {"padding": "#c9c9c9", "text": "#4d6a86", "vision": GREEN}


def draw_all(folder: Path | str) -> list[Path]:
    """Draw the pictures of the docs into a folder, and return their paths."""
    folder = Path(folder)
    layout = TokenLayout.from_grids(
        21, [[(5, (1, 2, 3)), (13, (2, 2, 1))]], valid=torch.arange(21)[None] >= 2
    )
    shape: dict[str, Any] = {"dim": 8, "num_heads": 1, "num_kv_heads": 1}
    branches = {
        "attention\n(the teacher)": build("attention", **shape),
        "Flex-MA\n(all that the law allows)": build("flex_ma", **shape, conv_size=0),
        "Local-Swin\n(windows 1×2×2, text window 4)": build(
            "swin3d", **shape, window=(1, 2, 2), text_window=4
        ),
    }
    drawn = {
        "scan_orders.png": scan_orders((2, 3, 4)),
        "windows.png": windows((4, 6, 8), (2, 4, 4), token=(1, 3, 3)),
        "reach.png": reach(layout, branches),
    }
    for name, figure in drawn.items():
        save(figure, folder / name)
    return [folder / name for name in drawn]


def scan_orders(grid: Grid) -> Figure:
    """Draw in which order Rotary Major Scan reads a clip in layers ℓ = 0 … 3 (mod 4).

    Args:
        grid: (T, H, W) of the clip.
    """
    frames, height, width = grid
    layout = TokenLayout.from_grids(frames * height * width, [[(0, grid)]])
    figure = blank_figure(2 * (0.4 * width * frames + 0.9), 2 * (0.4 * height + 0.75))
    parts: Any = figure.subfigures(2, 2)
    for layer, (part, axes) in enumerate(zip(parts.flat, ROTARY_MAJOR_SCAN)):
        inverse = layout.scan(axes).inverse
        steps = torch.arange(layout.length) if inverse is None else inverse[0]
        title = f"layers {layer}, {layer + 4}, …: ({', '.join(axes)}), {axes[-1]} fastest"
        part.suptitle(title, fontsize=11, color=INK)
        for t, panel in enumerate(part.subplots(1, frames, squeeze=False)[0]):
            _draw_steps(panel, steps.view(grid)[t], layout.length)
            panel.set_xlabel(f"t = {t},  w →", fontsize=9, color=INK)
            panel.set_ylabel("← h" if t == 0 else "", fontsize=9, color=INK)
    return figure


def windows(grid: Grid, window: Grid, token: Grid) -> Figure:
    """Draw how Local-Swin cuts a clip into windows on even and odd layers, and what one token sees.

    Args:
        grid: (T, H, W) of the clip.
        window: Extent of a window in tokens along (t, h, w).
        token: (t, h, w) of the token whose window is filled.
    """
    frames, height, width = grid
    layout = TokenLayout.from_grids(frames * height * width, [[(0, grid)]])
    at = (token[0] * height + token[1]) * width + token[2]
    figure = blank_figure(0.24 * width * frames + 1, 2 * (0.24 * height + 0.6))
    parts: Any = figure.subfigures(2, 1)
    for part, shifted in zip(parts, (False, True)):
        blocks = layout.windows(window, shifted)
        assert blocks is not None
        member = torch.empty(layout.length, dtype=torch.long)
        for number, tokens in enumerate(blocks.queries):
            member[tokens[tokens >= 0]] = number
        own, members = int(member[at]), member.view(grid)
        seen = int((member == own).sum())
        name = "odd layers, cuts moved by half a window" if shifted else "even layers"
        part.suptitle(f"{name}: the marked token sees the {seen} in blue", fontsize=11, color=INK)
        for t, panel in enumerate(part.subplots(1, frames, squeeze=False)[0]):
            _draw_windows(panel, members[t], own, (token[1], token[2]) if t == token[0] else None)
            partners = [str(u) for u in range(frames) if u != t and bool((members[u] == members[t]).any())]
            shared = f"in windows with t = {' and '.join(partners)}" if partners else "in windows of its own"
            panel.set_xlabel(f"t = {t}, {shared}", fontsize=9, color=INK)
    return figure


def reach(layout: TokenLayout, branches: Mapping[str, TokenMixer]) -> Figure:
    """Draw which input tokens each output token of a mixer depends on, one panel a mixer.

    Args:
        layout: A single row.
        branches: Panel title → mixer.
    """
    size = 0.11 * layout.length + 0.6
    figure = blank_figure(size * len(branches), size + 0.75)
    for panel, (title, mixer) in zip(figure.subplots(1, len(branches), squeeze=False)[0], branches.items()):
        _draw_reach(panel, layout, dependencies(mixer, layout))
        panel.set_title(title, fontsize=10, color=INK)
    entries = {
        "text token": KINDS["text"],
        "vision token": KINDS["vision"],
        "padding": KINDS["padding"],
        "looks back": BACK,
        "looks ahead, within its clip": AHEAD,
    }
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=9)
    return figure


def dependencies(mixer: TokenMixer, layout: TokenLayout) -> Tensor:
    """Find by automatic differentiation which inputs of a mixer change which outputs.

    Args:
        mixer: Any mixer; a copy in fp64 is asked.
        layout: A single row of N tokens.

    Returns:
        bool [N, N], True at (i, j) where output i depends on input j. Rows of padding, whose output is
        unspecified, are False.
    """
    mixer = copy.deepcopy(mixer).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, layout.length, mixer.config.dim, dtype=torch.float64, generator=generator)

    def outputs(x: Tensor) -> Tensor:
        return mixer(x, layout).sum(-1)[0]

    gradients = torch.autograd.functional.jacobian(outputs, x)[:, 0].abs().sum(-1)
    depends = gradients > 0
    return depends if layout.valid is None else depends & layout.valid[0][:, None]


def save(figure: Figure, path: Path | str) -> None:
    """Write a picture on white ground, so that it reads in a dark page too; a PNG says what it shows.

    Its ``Description`` is :func:`fingerprint`, by which a picture that is out of date is found.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    about = {"Description": fingerprint(figure)}
    figure.savefig(path, dpi=150, facecolor=PAPER, bbox_inches="tight", pad_inches=0.1, metadata=about)


def fingerprint(figure: Figure) -> str:
    """Return a checksum of a picture's cells, lines and words, whichever matplotlib draws them."""
    from matplotlib.collections import QuadMesh
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    meshes: list[Any] = figure.findobj(QuadMesh)
    lines: list[Any] = figure.findobj(Line2D)
    texts: list[Any] = figure.findobj(Text)
    shown = [mesh.get_array().tolist() for mesh in meshes] + [line.get_xydata().tolist() for line in lines]
    shown += [text.get_text() for text in texts]
    return hashlib.sha256(json.dumps([part for part in shown if part]).encode()).hexdigest()


def _draw_steps(axes: Axes, steps: Tensor, total: int) -> None:
    """One frame: a cell a token, holding and coloured by the step at which it is read."""
    _draw_cells(axes, steps, "cividis", total - 1)
    for (h, w), step in _cells(steps):
        colour = "white" if step < 0.55 * total else "black"
        axes.text(w, h, str(step), ha="center", va="center", fontsize=10, color=colour)


def _draw_windows(axes: Axes, member: Tensor, own: int, token: tuple[int, int] | None) -> None:
    """One frame: thick lines between windows, the window ``own`` filled, the token marked."""
    _draw_cells(axes, (member == own).int(), [PALE, COLOURS[5]], 1)
    height, width = member.shape
    for (h, w), number in _cells(member):
        if w + 1 == width or member[h, w + 1] != number:
            axes.plot([w + 0.5] * 2, [h - 0.5, h + 0.5], color=INK, linewidth=2)
        if h + 1 == height or member[h + 1, w] != number:
            axes.plot([w - 0.5, w + 0.5], [h + 0.5] * 2, color=INK, linewidth=2)
    axes.plot([width - 0.5, -0.5, -0.5], [-0.5, -0.5, height - 0.5], color=INK, linewidth=2)
    if token is not None:
        axes.plot(token[1], token[0], marker="*", color=VERMILION, markeredgecolor=INK, markersize=14)


def _draw_reach(axes: Axes, layout: TokenLayout, depends: Tensor) -> None:
    """Rows are outputs, columns inputs; strips along the edges say what each token is."""
    from matplotlib.patches import Rectangle

    length = layout.length
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    _draw_cells(axes, depends.int() + (depends & ahead).int(), [PALE, BACK, AHEAD], 2)
    for i in range(length):
        if layout.valid is not None and not layout.valid[0, i]:
            kind = "padding"
        else:
            kind = "text" if layout.clip is None or layout.clip[0, i] < 0 else "vision"
        for corner in ((i - 0.5, -1.9), (-1.9, i - 0.5)):
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=KINDS[kind], edgecolor=PAPER, linewidth=0.8))
    axes.set_xlim(-2, length - 0.5)
    axes.set_ylim(length - 0.5, -2)
    axes.set_xlabel("token that is looked at", fontsize=9, color=INK)
    axes.set_ylabel("token that looks", fontsize=9, color=INK)


def _draw_cells(axes: Axes, table: Tensor, colours: str | list[str], highest: int) -> None:
    """A square a cell, centred on (w, h), coloured by its value in 0 … highest; h grows downward."""
    from matplotlib.colors import ListedColormap

    colour_map = colours if isinstance(colours, str) else ListedColormap(colours)
    height, width = table.shape
    edges = [torch.arange(n + 1).numpy() - 0.5 for n in (width, height)]
    axes.pcolormesh(
        *edges, table.numpy(), cmap=colour_map, vmin=0, vmax=highest, edgecolor=PAPER, linewidth=0.8
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _cells(table: Tensor) -> list[tuple[tuple[int, int], int]]:
    return [((h, w), value) for h, row in enumerate(table.tolist()) for w, value in enumerate(row)]


if __name__ == "__main__":
    for picture in draw_all(sys.argv[1] if len(sys.argv) > 1 else "docs/assets"):
        print(picture)
