"""The commands `linmu bench …`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.terminal import (
    EXIT_CODES,
    Commands,
    Device,
    Json,
    Plot,
    UsageError,
    command_line,
    debugging,
    err,
    out,
    spinner,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from recipes.bench.cases import Shapes
    from recipes.bench.inputs import Inputs

bench = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXIT_CODES,
    help="Measure time and memory at growing length.",
)

Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="A model with its attention.")]
Student = Annotated[
    str | None,
    typer.Option(
        "--student", metavar="MODEL", help="Its converted model; by default a copy is converted now."
    ),
]
Mixer = Annotated[str, typer.Option(metavar="NAME", help="What the copy is converted to.")]
Lengths = Annotated[str, typer.Option(metavar="N,N,…", help="Tokens of the prompt; k is 1024.")]


@bench.command(epilog=EXIT_CODES)
def prefill(
    ctx: typer.Context,
    teacher: Teacher = "tiny-vlm",
    student: Student = None,
    mixer: Mixer = "mmate",
    lengths: Lengths = "1k,2k,4k,8k,16k",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    max_seconds: Annotated[
        float, typer.Option(help="Leave out lengths where one run is expected to take longer.")
    ] = 60.0,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time and peak memory until the first token, teacher and student side by side.

    Models that see get slideshows of easy-VQA images, others random text. The
    floor is what the linear layers alone would take at the rate of a large
    matrix product, measured in the same run.
    """
    from recipes.bench.prefill import prefill as measure

    wanted = parse_lengths(lengths)
    models, inputs = _pair(teacher, student, mixer, device)
    with spinner("prefill") as now:
        rows = measure(models, inputs, wanted, repeats=repeats, max_seconds=max_seconds, progress=now)
    values = {"seconds": "prefill time (s)", "peak_mib": "prefill memory above weights (MiB)"}
    _show(ctx, f"prefill of {teacher}", rows, values, json, plot)


@bench.command(epilog=EXIT_CODES)
def decode(
    ctx: typer.Context,
    teacher: Teacher = "tiny-vlm",
    student: Student = None,
    mixer: Mixer = "mmate",
    lengths: Lengths = "1k,4k,16k",
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate after each prompt.")] = 16,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time of a new token and size of what the cache holds, teacher and student side by side."""
    from recipes.bench.decode import decode as measure

    wanted = parse_lengths(lengths)
    models, inputs = _pair(teacher, student, mixer, device)
    with spinner("decode") as now:
        rows = measure(models, inputs, wanted, new_tokens=new_tokens, progress=now)
    values = {"ms_per_token": "time of a new token (ms)", "state_mib": "cache (MiB)"}
    _show(ctx, f"decode of {teacher}", rows, values, json, plot)


Ops = Annotated[list[str] | None, typer.Argument(metavar="OP", help="Which; by default all.")]
Widths = Annotated[str, typer.Option("--shapes", metavar="NAME", help="small, or 7b: a layer of a 7B model.")]
Backends = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A backend of ours, several by several; by default all that run here."),
]
Add = Annotated[
    bool, typer.Option("--add", help="Keep the rows that the --json file has, except those made anew.")
]


@bench.command(epilog=EXIT_CODES)
def ops(
    ctx: typer.Context,
    names: Ops = None,
    shapes: Widths = "small",
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Tokens of the row; by default 8k to 64k, for 7b 4k to 128k."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="By default float32, for 7b bfloat16.")
    ] = None,
    device: Device = None,
    backend: Backends = None,
    backward: Annotated[
        bool | None,
        typer.Option("--backward/--forward", help="Also forward + backward; by default on a GPU."),
    ] = None,
    peers_to: Annotated[
        str, typer.Option(metavar="N", help="Longest row that others' parts are given; 0 leaves them out.")
    ] = "128k",
    repeats: Annotated[int, typer.Option(min=1, help="Timed laps; the median counts.")] = 3,
    max_seconds: Annotated[
        float, typer.Option(help="Leave out lengths where one run is expected to take longer.")
    ] = 10.0,
    json: Json = None,
    add: Add = False,
    plot: Plot = None,
) -> None:
    """The ops behind the mixers: our backends, others' parts, and the limits of the machine.

    Each backend is first checked, gradients included, against the op's form in
    float64; no speed is printed of a wrong result. The limits are the fewest
    bytes over the bandwidth of a copy, and the matrix products over the rate of
    a large one, both measured now.

    [dim]linmu bench ops ssd windows[/]
    [dim]linmu bench ops --shapes 7b --json ops.json --plot ops.png[/]
    """
    with spinner("loading"):
        import torch

        from recipes.bench.ops import growth, known, measure_ops
        from recipes.bench.roofline import Ceilings
        from recipes.models import best_device

    names, widths = known(names), _shapes(shapes)
    large = shapes != "small"
    wanted = parse_lengths(lengths or ("4k,8k,16k,32k,64k,128k" if large else "8k,16k,32k,64k"))
    (kind,) = _dtypes(dtype or ("bfloat16" if large else "float32"))
    longest = 0 if peers_to == "0" else parse_lengths(peers_to)[-1]
    place = torch.device(device or best_device())
    rows: list[dict[str, Any]] = []
    with spinner("ops") as now:
        now("ceilings")
        ceilings = Ceilings.measured(kind, place)
        rows.append(ceilings.row(kind))
        for name in names:
            rows += measure_ops(
                [name],
                wanted,
                shapes=widths,
                dtype=kind,
                device=place,
                backends=backend or None,
                ceilings=ceilings,
                backward=place.type == "cuda" if backward is None else backward,
                peers_to=longest,
                repeats=repeats,
                max_seconds=max_seconds,
                progress=now,
            )
            _write(ctx, rows, growth, json, add)  # what is measured stays if the rest is cut short
    _print(f"ops at shapes {shapes} on {place}", rows, growth)
    if plot is not None:
        from recipes import plots
        from recipes.results import Results

        plots.ops(plot, f"ops at shapes {shapes}", Results.read(json).rows if add and json else rows)


@bench.command(epilog=EXIT_CODES)
def check(
    ctx: typer.Context,
    names: Ops = None,
    shapes: Widths = "small",
    lengths: Annotated[
        str, typer.Option(metavar="N,N,…", help="Tokens of the rows; the first for every kind of row.")
    ] = "300,2k",
    dtype: Annotated[
        str, typer.Option(metavar="NAME,…", help="Which to check.")
    ] = "float32,bfloat16,float16",
    device: Device = None,
    backend: Backends = None,
    json: Json = None,
    add: Add = False,
) -> None:
    """Errors of the ops and of every gradient against float64, over kinds of rows.

    Text alone, one giant clip, many tiny ones, padding, packed sequences, decays
    near 0 and near 1. Exits with 1 if an error is above what its dtype allows.
    """
    with spinner("loading"):
        import torch

        from recipes.bench.checks import check_table
        from recipes.bench.ops import known
        from recipes.models import best_device

    names, widths, wanted, kinds = known(names), _shapes(shapes), parse_lengths(lengths), _dtypes(dtype)
    rows: list[dict[str, Any]] = []
    with spinner("checks") as now:
        for name in names:
            rows += check_table(
                [name],
                widths,
                wanted,
                dtypes=kinds,
                device=torch.device(device or best_device()),
                backends=backend or None,
                progress=now,
            )
            _write(ctx, rows, None, json, add)  # as for the speeds
    _print(f"errors at shapes {shapes}", rows)
    if wrong := [row for row in rows if row["right"] is False]:
        err.print(f"[bold red]{len(wrong)} of {len(rows)} checks failed[/]")
        raise typer.Exit(1)


@bench.command(epilog=EXIT_CODES)
def recovery(
    ctx: typer.Context,
    names: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Names of the library, patterns of them, or YAML files."),
    ],
    scale: Annotated[float, typer.Option(metavar="X", help="Multiply the steps of every stage.")] = 1.0,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Train each for so long, all stages together, whatever their steps."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Run each with each; by default with its own.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the runs go, a folder a recipe and seed.")
    ] = Path("runs/recovery"),
    json: Json = None,
    add: Add = False,
) -> None:
    """Run recipes and lay what they recover of their teachers side by side.

    Each is distilled and judged as it says itself; a teacher's own scores are
    measured once. A run that fails is a row with a note that names the file of its
    traceback, and the rest go on (not with linmu --debug); a run that was killed
    goes on when the same command is given again. With --add several processes, one
    a GPU, fill one file.

    [dim]linmu bench recovery linmu-smollm2-135m 'peer-*' --json recovery.json[/]
    [dim]linmu bench recovery linmu-smollm2-135m 'peer-*' --minutes 8 --json recovery.json[/]
    [dim]linmu bench recovery 'ablate-text-*' --scale 0.45 --seeds 0,1,2 --json a.json --add[/]
    """
    if scale <= 0:
        raise UsageError(f"--scale must be positive, found {scale:g}.")
    if minutes is not None and (minutes <= 0 or scale != 1):
        raise UsageError(
            f"--minutes must be positive, and goes without --scale; found {minutes:g} and {scale:g}."
        )
    numbers = _seeds(seeds)
    with spinner("loading"):
        from recipes.bench.recovery import FIGURES, OF_TEACHER, Shelf, chosen, ordered, read, scaled, write
        from recipes.bench.recovery import recovery as run
        from recipes.results import table

    plans = [scaled(recipe, scale, seed, minutes) for recipe in chosen(names) for seed in numbers]
    if json is not None and add and json.exists():
        read(json)  # refused before the runs, not after them
    shelf, rows = Shelf(), list[dict[str, Any]]()
    with spinner("recovery") as now:
        for plan in plans:
            what = f"{plan.name}-{plan.seed}"
            rows += run(plan, folder / what, shelf, functools.partial(now, what), debug=debugging(ctx))
            if json is not None:  # what is measured stays if the rest is cut short
                write(json, command_line(ctx), rows, add=add)
    measured = [name for name in (*FIGURES, OF_TEACHER) if any(name in row for row in rows)]
    out.print(table(ordered(rows), title="recovery", columns=["recipe", "seed", *measured, "minutes"]))
    if failed := [row for row in rows if "note" in row]:
        for row in failed:
            err.print(f"{row['recipe']}, seed {row['seed']}: {row['note']}", markup=False)
        err.print(f"[bold red]{len(failed)} of {len(plans)} runs failed[/]")
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | list[None]:
    if text is None:
        return [None]
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--seeds takes numbers such as 0,1,2; found {text!r}.") from None


def parse_lengths(text: str) -> list[int]:
    """Read ``"1k,4096"`` as [1024, 4096].

    Raises:
        UsageError: A part is not a positive number, or they do not rise.
    """
    try:
        lengths = [
            int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.lower().split(",")
        ]
    except ValueError:
        raise UsageError(f"--lengths takes numbers such as 1k,4096,16k; found {text!r}.") from None
    if lengths != sorted(set(lengths)) or lengths[0] < 1:
        raise UsageError(f"--lengths must be positive and rise; found {text!r}.")
    return lengths


def _shapes(name: str) -> Shapes:
    from recipes.bench.cases import SHAPES

    if name not in SHAPES:
        raise UsageError(f"--shapes must be one of {', '.join(SHAPES)}; found {name!r}.")
    return SHAPES[name]


def _dtypes(names: str) -> list[torch.dtype]:
    from recipes.bench.checks import TOLERANCE

    known = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
    for name in names.split(","):
        if name not in known:
            raise UsageError(f"--dtype must be one of {', '.join(known)}; found {name!r}.")
    return [known[name] for name in names.split(",")]


Figures = Callable[[list[dict[str, Any]]], dict[str, float]]


def _print(title: str, rows: list[dict[str, Any]], more: Figures | None = None) -> None:
    """Print the rows of a bench of ops, what is missing and why, and the figures that they give."""
    from recipes.bench.bars import figures, summed
    from recipes.results import table

    speed = [row for row in rows if row["table"] == "speed" and row["tokens"]]
    if speed:
        columns = (
            "op",
            "by",
            "tokens",
            "fwd_ms",
            "fwd_bwd_ms",
            "peak_mib",
            "bytes_ms",
            "products_ms",
            "error",
        )
        out.print(table(speed, title=title, columns=columns))
    if checks := [row for row in rows if row["table"] == "check"]:
        out.print(table(summed(checks), title=title))
    for row in rows:
        if row.get("note") or row.get("right") is False:
            where = ", ".join(str(row[key]) for key in ("row", "decay", "tokens", "dtype") if row.get(key))
            wrong = {key: row.get(key) for key in ("error", "gradient_error", "worst")}
            out.print(f"{row['op']} by {row['by']} ({where}): {row['note'] or wrong}", markup=False)
    if machine := [row for row in rows if row["table"] == "machine"]:
        out.print(table(machine, title="this machine reaches", columns=list(machine[0])[1:]))
    if found := (more(rows) if more else {}) | figures(rows):
        out.print(table([{"figure": name, "value": value} for name, value in found.items()]))


def _write(
    ctx: typer.Context, rows: list[dict[str, Any]], more: Figures | None, json: Path | None, add: bool
) -> None:
    from recipes.bench.bars import figures, ordered
    from recipes.results import write_rows

    def all_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return (more(rows) if more else {}) | figures(rows)

    if json is not None:
        write_rows(json, command_line(ctx), rows, all_figures, join=ordered if add else None)


def _pair(
    teacher: str, student: str | None, mixer: str, device: str | None
) -> tuple[dict[str, PreTrainedModel], Inputs]:
    with spinner("loading"):
        import copy

        import bridges
        from recipes.bench.inputs import inputs_for
        from recipes.models import load_model

        loaded = load_model(teacher, device)
        if student is None:
            converted = copy.deepcopy(loaded.model)
            bridges.replace_attention(converted, mixer)
        else:
            converted = load_model(student, device).model
        return {"teacher": loaded.model, "student": converted}, inputs_for(loaded.model, loaded.tokenizer)


def _show(
    ctx: typer.Context,
    title: str,
    rows: list[dict[str, Any]],
    values: dict[str, str],
    json: Path | None,
    plot: Path | None,
) -> None:
    from recipes.results import Results, table

    out.print(table(rows, title=title))
    if json is not None:
        Results(command_line(ctx), {}, rows).write(json)
    if plot is not None:
        from recipes import plots

        plots.scaling(plot, title, rows, values)
