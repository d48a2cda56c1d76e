"""Pictures of results, by matplotlib without a display. Colours are told apart by the colour-blind (Okabe-Ito)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import RecipeError
from recipes.results import loss_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

INK, GREY = "#222222", "#8a8a8a"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"


class PlotError(RecipeError, RuntimeError):
    """Matplotlib is missing, or there is nothing to draw."""


def demo(
    path: Path | str,
    title: str,
    accuracy: Mapping[str, float],
    prefill: Sequence[Row],
    decode: Sequence[Row],
    history: Sequence[Row],
) -> None:
    """Draw the demo's one picture: accuracy, costs at growing length, and the losses of the stages.

    Args:
        path: File to write; its ending chooses the format.
        title: Above all.
        accuracy: Label → fraction, in the order to show; the first is the teacher.
        prefill: Rows of :func:`recipes.bench.prefill.prefill`.
        decode: Rows of :func:`recipes.bench.decode.decode`.
        history: Rows of a distillation: ``stage``, ``step``, ``loss``.
    """
    figure = blank_figure(16, 8.2)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.15, 1))
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    panels = top.subplots(1, 4)
    draw_accuracy(panels[0], accuracy)
    draw_scaling(panels[1], prefill, "seconds", "prefill time (s)")
    draw_scaling(panels[2], prefill, "peak_mib", "prefill memory above weights (MiB)")
    draw_scaling(panels[3], decode, "state_mib", "cache for decoding (MiB)")
    draw_losses(bottom, history)
    top.suptitle(title, fontweight="bold", fontsize=13)
    _save(figure, path)


def scaling(
    path: Path | str, title: str, rows: Sequence[Row], values: Mapping[str, str], by: str = "model"
) -> None:
    """Draw one log-log panel a value against tokens, a line for each model (or op).

    Args:
        path: File to write.
        title: Above all.
        rows: Each with ``tokens``, the values, and who they are of.
        values: Key in the rows → axis label.
        by: Key that says who.
    """
    figure = blank_figure(5.2 * len(values) + 1, 4.4)
    for axes, (value, label) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
        draw_scaling(axes, rows, value, label, by)
    figure.suptitle(title, fontweight="bold")
    _save(figure, path)


def ops(path: Path | str, title: str, rows: Sequence[Row]) -> None:
    """Draw a bench of ops: the roofline of the longest rows, then for each op its time over its length.

    Args:
        path: File to write.
        title: Above all.
        rows: Of ``linmu bench ops``, that of the machine included.
    """
    from recipes.bench.bars import points

    speed = [row for row in rows if row["table"] == "speed" and row.get("fwd_ms")]
    if not speed:
        raise PlotError("there is no time to draw: no op was measured.")
    grown = [
        op
        for op in dict.fromkeys(row["op"] for row in speed)
        if len({row["tokens"] for row in speed if row["op"] == op}) > 1
    ]
    columns = min(3, 1 + len(grown))
    lines = -(-(1 + len(grown)) // columns)
    figure = blank_figure(5.6 * columns, 4.6 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    machine = next(row for row in reversed(rows) if row["table"] == "machine")
    draw_roofline(panels[0], points(rows), machine["copy_tb_per_second"], machine["matmul_tflops"])
    colours = dict(zip(dict.fromkeys(row["by"] for row in speed), itertools.cycle(COLOURS)))
    for axes, op in zip(panels[1:], grown):
        draw_times(axes, [row for row in speed if row["op"] == op], op, colours)
    for axes in panels[1 + len(grown) :]:
        axes.remove()
    figure.suptitle(title, fontweight="bold")
    _save(figure, path)


def report(
    path: Path | str, title: str, scores: Sequence[Row], layers: Sequence[Row], history: Sequence[Row]
) -> None:
    """Draw a report: recovery by task and group, errors of layers, and the losses of the stages.

    Args:
        path: File to write.
        title: Above all.
        scores: Rows of :class:`recipes.report.Report`.
        layers: Its layers; may be empty.
        history: Rows of a distillation; may be empty.
    """
    bars = [row for row in scores if row["recovery"] is not None]
    if not bars:
        raise PlotError("there is no recovery to draw: the teacher scores 0 everywhere.")
    heights = [max(3.6, 1.2 + 0.26 * len(bars)), *([3.6] if history else [])]
    figure = blank_figure(13, sum(heights))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    top, *bottom = (figure.add_subfigure(grid[row]) for row in range(len(heights)))
    panels = top.subplots(1, 2 if layers else 1, squeeze=False)[0]
    draw_recovery(panels[0], bars)
    if layers:
        draw_layers(panels[1], layers)
    for part in bottom:
        draw_losses(part, history)
    top.suptitle(title, fontweight="bold", fontsize=13)
    _save(figure, path)


def accuracies(path: Path | str, title: str, groups: Mapping[str, float]) -> None:
    """Draw one bar a group."""
    figure = blank_figure(max(4.0, 1.2 + 0.8 * len(groups)), 4.4)
    draw_accuracy(figure.subplots(), groups)
    figure.suptitle(title, fontweight="bold")
    _save(figure, path)


def losses(path: Path | str, title: str, history: Sequence[Row]) -> None:
    """Draw the losses of a distillation, one panel a stage.

    Args:
        path: File to write.
        title: Above all.
        history: Rows with ``stage``, ``step`` and ``loss``.
    """
    figure = blank_figure(3.9 * max(1, len({row["stage"] for row in history})) + 1, 3.8)
    draw_losses(figure, history)
    figure.suptitle(title, fontweight="bold")
    _save(figure, path)


def draw_accuracy(axes: Axes, accuracy: Mapping[str, float]) -> None:
    """Bars of fractions, labelled in percent; the first, the yardstick, also as a line across."""
    values = list(accuracy.values())
    colours = [COLOURS[0], *[COLOURS[1]] * (len(values) - 1)]
    bars = axes.bar(range(len(values)), values, color=colours, width=0.66)
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=2, color=INK)
    if values:
        axes.axhline(values[0], color=COLOURS[0], linestyle=":", linewidth=1, zorder=0)
    axes.set_xticks(range(len(values)), list(accuracy), fontsize=9, rotation=30 if len(values) > 5 else 0)
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("accuracy by generation", fontsize=10.5)
    axes.grid(axis="y", alpha=0.25)


def draw_recovery(axes: Axes, scores: Sequence[Row]) -> None:
    """One horizontal bar a task, measure and group, in a colour a task and measure; 1 is the teacher."""
    names = [(row["task"], row["measure"]) for row in scores]
    colours = dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS[1:])))
    for name, colour in colours.items():
        own = [place for place, other in enumerate(names) if other == name]
        values = [scores[place]["recovery"] for place in own]
        bars = axes.barh(own, values, color=colour, height=0.7, label=": ".join(name))
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, color=INK, fontsize=8.5)
    axes.axvline(1, color=COLOURS[0], linestyle=":", linewidth=1)
    axes.set_yticks(range(len(scores)), [row["group"] for row in scores], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(1, *(row["recovery"] for row in scores)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("student's part of the teacher's score", fontsize=10.5)
    axes.grid(axis="x", alpha=0.25)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower left", ncols=4
    )


def draw_layers(axes: Axes, layers: Sequence[Row]) -> None:
    """Error of each layer, injected and chained; an error of 0 is left out of the logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    for name, colour, marker in zip(("injected", "chained"), COLOURS[1:], MARKERS):
        points = [(row["layer"], row[name]) for row in layers if row[name] > 0]
        if points:
            axes.plot(*zip(*points), color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
    if axes.lines:
        _log_scale(axes)
        axes.legend(frameon=False, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title("error of layers, of the teacher's squared size", fontsize=10.5)
    axes.grid(alpha=0.25)


def draw_scaling(axes: Axes, rows: Sequence[Row], value: str, label: str, by: str = "model") -> None:
    """One line for each model on log-log axes; the two slopes, linear and quadratic, are drawn faintly."""
    for (name, colour), marker in zip(
        zip(dict.fromkeys(row[by] for row in rows), itertools.cycle(COLOURS)), itertools.cycle(MARKERS)
    ):
        points = [(row["tokens"], row[value]) for row in rows if row[by] == name and row[value] is not None]
        if points:
            axes.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=2, label=name)
    lengths = sorted({row["tokens"] for row in rows})
    measured = [row[value] for row in rows if row[value] is not None]
    if measured and len(lengths) > 1:
        low, high = min(measured) * 0.55, max(measured) * 1.8
        for power, name in ((1, "linear"), (2, "quadratic")):
            slope = [low * (n / lengths[0]) ** power for n in lengths]
            shown = [(n, y) for n, y in zip(lengths, slope) if y <= high]
            axes.plot(*zip(*shown), color=GREY, linestyle="--", linewidth=1, zorder=0)
            axes.annotate(f" {name}", shown[-1], color=GREY, fontsize=8.5, va="center")
        axes.set_ylim(low * 0.8, high)
        axes.set_xlim(lengths[0] * 0.85, lengths[-1] * 1.9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_thousands(n) for n in lengths])
    _log_scale(axes)
    axes.set_xlabel("tokens in the prompt")
    axes.set_title(label, fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")


def draw_roofline(axes: Axes, points: Sequence[Row], bandwidth: float, rate: float) -> None:
    """What ops reach below the two ceilings: the bandwidth (TB/s) and the matrix rate (TFLOP/s)."""
    intensities = [point["intensity"] for point in points]
    ridge = rate / bandwidth
    low, high = min([ridge, *intensities]) / 8, max([ridge, *intensities]) * 8
    axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color=INK, linewidth=2)
    axes.annotate(
        f"{bandwidth:.3g} TB/s",
        (low * 1.5, low * 1.3 * bandwidth),
        color=GREY,
        fontsize=8.5,
        va="top",
    )
    axes.annotate(f"{rate:.3g} TFLOP/s", (high, rate), color=GREY, fontsize=8.5, ha="right", va="bottom")
    names = list(dict.fromkeys(point["op"] for point in points))
    for name, colour, marker in zip(names, itertools.cycle(COLOURS), itertools.cycle(MARKERS)):
        for kind, filled in (("ours", colour), ("peer", "none")):
            own = [point for point in points if (point["op"], point["kind"]) == (name, kind)]
            axes.scatter(
                [point["intensity"] for point in own],
                [point["tflops"] for point in own],
                marker=marker,
                facecolors=filled,
                edgecolors=colour,
                label=name if kind == "ours" else None,
                zorder=3,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte, at the fewest bytes")
    axes.set_title("forward, TFLOP/s (filled: ours; hollow: best peer)", fontsize=10.5)
    axes.grid(alpha=0.25)
    if names:
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def draw_times(axes: Axes, rows: Sequence[Row], title: str, colours: Mapping[str, str]) -> None:
    """Time over tokens, log-log: solid forward, dashed forward + backward; a colour an implementation."""
    names = dict.fromkeys(row["by"] for row in rows)
    for name, marker in zip(names, itertools.cycle(MARKERS)):
        for value, style in (("fwd_ms", "-"), ("fwd_bwd_ms", "--")):
            points = [(row["tokens"], row[value]) for row in rows if row["by"] == name and row.get(value)]
            if points:
                (line,) = axes.plot(*zip(*points), style, color=colours[name], marker=marker, markersize=4)
                if value == "fwd_ms":
                    line.set_label(name)
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_thousands(n) for n in lengths])
    _log_scale(axes)
    axes.set_xlabel("tokens (dashed: forward + backward)")
    axes.set_title(f"{title} (ms)", fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def draw_losses(figure: Any, history: Sequence[Row]) -> None:
    """One panel a stage, each loss that the stage has in its own colour; losses keep it over the stages."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    if not stages:
        raise PlotError("there is no loss to draw: the history is empty.")
    colours = dict(zip(loss_names(history), itertools.cycle([INK, *COLOURS[1:], COLOURS[0]])))
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for number, (axes, stage) in enumerate(zip(panels, stages), start=1):
        for name in loss_names(history):
            points = [
                (r["step"], r[name]) for r in history if r["stage"] == stage and r.get(name) is not None
            ]
            if points:
                axes.plot(*zip(*points), color=colours[name], linewidth=1.6, label=name.replace("_", " "))
        _log_scale(axes)
        axes.set_xlabel("step")
        axes.set_title(f"losses, stage {number} {stage}", fontsize=10.5)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8.5)


def _log_scale(axes: Axes) -> None:
    """Logarithmic y axis with plain numbers at 1, 2, 5 of each decade."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _thousands(number: int) -> str:
    return f"{number / 1024:.0f}k" if number >= 1024 else str(number)


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches that needs no screen.

    Raises:
        PlotError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('pictures need matplotlib: pip install "linmu[eval]"') from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path | str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.get_axes():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
