"""The commands `linmu bench …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.terminal import EXIT_CODES, Commands, Device, Json, Plot, UsageError, command_line, out, spinner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@bench.command(epilog=EXIT_CODES)
def ops(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="OP", help="Which; by default all.")] = None,
    lengths: Lengths = "8k,16k,32k,64k",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Device = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The ops behind the mixers, on every backend that runs here.

    Each backend is first checked against the dense O(N²) form of the op in
    float64; no speed is printed of a wrong result. The growth says how much
    faster than linearly the time rises from the first length to the last.
    """
    with spinner("loading"):
        from recipes.bench.ops import TOLERANCE, growth, measure_ops
        from recipes.models import best_device

    wanted = parse_lengths(lengths)
    dtypes = {str(known).removeprefix("torch."): known for known in TOLERANCE}
    if dtype not in dtypes:
        raise UsageError(f"--dtype must be one of {', '.join(dtypes)}; found {dtype!r}.")
    device = device or best_device()
    with spinner("ops") as now:
        rows = measure_ops(names, wanted, dtype=dtypes[dtype], device=device, repeats=repeats, progress=now)
    figures = growth(rows)
    values = {"ms": "time (ms)", "peak_mib": "memory above inputs (MiB)"}
    _show(ctx, f"ops in {dtype} on {device}", rows, values, json, plot, figures, by="op")


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
    figures: dict[str, float] | None = None,
    by: str = "model",
) -> None:
    from recipes.results import Results, table

    out.print(table(rows, title=title))
    if figures:
        out.print(table([figures]))
    if json is not None:
        Results(command_line(ctx), figures or {}, rows).write(json)
    if plot is not None:
        from recipes import plots

        plots.scaling(plot, title, rows, values, by)
