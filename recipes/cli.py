"""The command `linmu`. Torch and transformers are imported inside the commands, so that help answers at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.bench.commands import bench
from recipes.data_commands import data
from recipes.terminal import (
    EXIT_CODES,
    Commands,
    Device,
    Json,
    Plot,
    UsageError,
    command_line,
    err,
    out,
    progress,
    quiet_libraries,
    spinner,
)

if TYPE_CHECKING:
    from recipes.evaluate import Evaluation

START, CONVERT, MEASURE = "Start here", "Convert and distil", "Measure"

app = typer.Typer(
    cls=Commands,
    name="linmu",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
)
app.add_typer(data, name="data", rich_help_panel=CONVERT)
app.add_typer(bench, name="bench", rich_help_panel=MEASURE)

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a folder may hold beside model and tokenizer, and a converted model needs just as well."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model: [bold]tiny-vlm[/] (ships with linmu), [bold]smollm2-135m[/], [bold]vlm-mini[/], "
        "a folder, or a hub name.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"linmu {version('linmu')}")
        raise typer.Exit


@app.callback()
def linmu(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Turn a pretrained vision-language model into one whose cost grows linearly with its input.

    Every self-attention layer of the decoder becomes a linear-time token mixer
    that starts from the layer's own weights (LinMU, arXiv 2601.01322); three
    stages of distillation bring the accuracy back.

    [bold]linmu doctor[/]  what works on this machine
    [bold]linmu demo[/]    all of it on a small model, in minutes on a CPU
    """
    quiet_libraries()


@app.command(rich_help_panel=START, epilog=EXIT_CODES)
def demo(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the picture, demo.json and the student go.")
    ] = Path("runs/demo"),
    questions: Annotated[int, typer.Option(min=1, help="Test questions for teacher and student.")] = 2000,
) -> None:
    """Linearise a small vision-language model from end to end, and see what it gains.

    A Qwen2.5-VL of a million weights that answers questions about images
    (easy-VQA) is converted, distilled in three stages, and compared with its
    teacher: accuracy by generation, prefill time, memory. Takes about five
    minutes on two CPU cores. Exits with 1 if the student keeps less than 97%
    of the teacher's accuracy.
    """
    with spinner("loading"):
        from recipes.demo import run

    if not run(folder, command=command_line(ctx), questions=questions):
        raise typer.Exit(1)


@app.command(rich_help_panel=START, epilog=EXIT_CODES)
def doctor() -> None:
    """Say what works on this machine: packages, device, backends, a small conversion.

    Exits with 1 if something is broken that linmu cannot do without.
    """
    from recipes.doctor import examine, healthy, section_table

    findings = []
    for heading, section in examine():
        out.print(section_table(heading, section))
        findings += section
    if not healthy(findings):
        broken = ", ".join(finding.part for finding in findings if finding.required and finding.state != "ok")
        err.print(f"[bold red]linmu cannot run here:[/] {broken}")
        raise typer.Exit(1)
    out.print("[bold green]linmu can run here.[/]")


@app.command(rich_help_panel=CONVERT, epilog=EXIT_CODES)
def convert(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted model.")],
    mixer: Annotated[
        str,
        typer.Option(metavar="NAME", help="What replaces attention, e.g. mmate, bimamba2, sliding_window."),
    ] = "mmate",
    layers: Annotated[
        str, typer.Option(metavar="PATTERN", help="Layers to convert: all, or e.g. 0,4-7,-1.")
    ] = "all",
    init: Annotated[
        str, typer.Option(metavar="WHENCE", help="Projections start from the teacher's attention, or random.")
    ] = "attention",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of the mixer's config; may be repeated."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Load and save as float32 or bfloat16.")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Write into OUT although it is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
) -> None:
    """Replace the self-attention of a model's decoder by token mixers, and save it.

    The report says for every layer which weights were kept, copied, made and
    dropped. The converted model is a starting point: it needs [bold]linmu
    distill[/] to answer as its teacher does.

    [dim]linmu convert tiny-vlm runs/student --dry-run[/]
    [dim]linmu convert Qwen/Qwen2.5-VL-3B-Instruct runs/student --layers 1-35 --set window=[4,8,8][/]
    """
    fields = _parse_settings(settings or [])
    if not dry_run and not force and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; choose another folder, or pass --force.")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype must be float32 or bfloat16, found {dtype!r}.")
    with spinner("loading"):
        import bridges
        from recipes.plan import TeacherSpec
        from recipes.teachers import load_teacher

        teacher = load_teacher(TeacherSpec.model_validate({"model": model, "dtype": dtype}))
    arguments: dict[str, Any] = {"layers": layers, "init": init, **fields}
    if dry_run:
        out.print(str(bridges.plan(teacher.model, mixer, **arguments)), markup=False, soft_wrap=True)
        out.print("Dry run: nothing was changed or written.")
        return
    report = bridges.replace_attention(teacher.model, mixer, **arguments)
    out.print(str(report), markup=False, soft_wrap=True)
    with spinner(f"saving {folder}"):
        teacher.model.save_pretrained(folder)
        teacher.tokenizer.save_pretrained(folder)
        for file in PROCESSOR_FILES:
            if (Path(model) / file).is_file():
                shutil.copy2(Path(model) / file, folder)
    out.print(f"Saved to {folder}. Load it by bridges.load_pretrained({str(folder)!r}).", markup=False)


@app.command(rich_help_panel=CONVERT, epilog=EXIT_CODES)
def explain(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name of the library or a YAML file.")
    ] = None,
) -> None:
    """Say what a recipe will do, stage by stage, before it does it; without RECIPE, list the library.

    Loads the teacher to count what trains and what is frozen; trains nothing.
    """
    from recipes.plan import Recipe

    if recipe is None:
        from recipes.results import table

        recipes = [Recipe.load(name) for name in Recipe.names()]
        out.print(
            table([{"recipe": r.name, "teacher": r.teacher.model, "what": r.description} for r in recipes])
        )
        return
    plan = Recipe.load(recipe)
    with spinner("loading the teacher"):
        from recipes.teachers import load_teacher

        teacher = load_teacher(plan.teacher)
    out.print(str(plan.explain(teacher.model)), markup=False, soft_wrap=True)


@app.command(rich_help_panel=CONVERT, epilog=EXIT_CODES)
def distill(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name of the library or a YAML file.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with a run that was cut off, or begin anew.")
    ] = True,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Convert a recipe's teacher and train the student in the recipe's stages.

    A run that was killed goes on where its last checkpoint was. The student is saved in DIR/student.

    [dim]linmu explain[/]                                  the recipes there are
    [dim]linmu distill linmu-tiny-vlm --out runs/tiny --plot runs/tiny/losses.png[/]
    """
    from recipes.plan import Recipe
    from recipes.results import Results, first_and_last, table

    plan = Recipe.load(recipe)
    with spinner("loading the teacher"):
        from recipes.distill import distill as run
        from recipes.progress import ProgressBars
        from recipes.teachers import load_teacher

        teacher = load_teacher(plan.teacher)
    with ProgressBars(plan) as bars:
        distilled = run(plan, folder, teacher=teacher, restart=not resume, callbacks=[bars])
    rows = first_and_last(distilled.history)
    out.print(table(rows, title=f"{plan.name}: losses"))
    out.print(f"The student is in {folder / 'student'}.", markup=False)
    if json is not None:
        figures = {
            f"{row['stage']}_{row['loss']}_{end}": row[end] for row in rows for end in ("first", "last")
        }
        Results(command_line(ctx), figures, distilled.history).write(json)
    if plot is not None:
        from recipes import plots

        plots.losses(plot, plan.name, distilled.history)


@app.command(rich_help_panel=MEASURE, epilog=EXIT_CODES)
def evaluate(
    ctx: typer.Context,
    model: Model,
    task: Annotated[str, typer.Option(metavar="NAME", help="What to ask.")] = "easy-vqa",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask so many questions, spread over the test split.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 128,
    likelihood: Annotated[
        bool, typer.Option("--perplexity", help="Also the perplexity of the right answers: secondary.")
    ] = False,
    device: Device = None,
    json: Json = None,
    plot: Plot = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="MODEL is the folder of a finished run: measure its student beside its teacher by what its "
            "recipe is [bold]judged_by[/], and write report.json, report.md and report.png to DIR.",
        ),
    ] = None,
) -> None:
    """Ask a model the questions of a test split and score what it generates.

    Teacher and student are judged by the same code. Perplexity alone flatters
    converted models (arXiv 2603.26556), so it is only given beside accuracy.

    [dim]linmu evaluate tiny-vlm --limit 2000[/]
    [dim]linmu evaluate runs/tiny/student --json student.json[/]
    [dim]linmu evaluate runs/tiny --report runs/tiny/report[/]
    """
    if report is not None:
        _report(ctx, Path(model), report, limit, device)
        return
    with spinner("loading"):
        from recipes.data import load_task
        from recipes.evaluate import evaluate as ask
        from recipes.evaluate import perplexity
        from recipes.models import load_model
        from recipes.plan import TaskSpec
        from recipes.results import Results, table

        judged = load_model(model, device)
        questions = load_task(TaskSpec(task=task), judged.model.config, judged.tokenizer)
    with progress(f"{task}: asking") as told:
        found = ask(judged.model, questions, limit=limit, batch_size=batch_size, progress=told)
    figures: dict[str, Any] = {
        "accuracy": found.accuracy,
        "questions": found.questions,
        "seconds": round(found.seconds, 2),
    }
    rows = found.rows()
    if likelihood:
        with progress(f"{task}: perplexity") as told:
            likely = perplexity(judged.model, questions, limit=limit, progress=told)
        figures["perplexity"] = likely.perplexity
        for row in rows:
            if (group := likely.groups.get(row["group"])) is not None:
                row["perplexity"] = group.perplexity
    out.print(table(rows))
    out.print(table([figures], title=f"{model} on {task}"))
    if json is not None:
        Results(command_line(ctx), figures, rows).write(json)
    if plot is not None:
        from recipes import plots

        plots.accuracies(plot, f"{model} on {task}", _bars(found))


def _report(ctx: typer.Context, run: Path, folder: Path, limit: int | None, device: str | None) -> None:
    """Measure a finished run and write what was found."""
    sources = {parameter: ctx.get_parameter_source(str(parameter.name)) for parameter in ctx.command.params}
    typed = [parameter for parameter, source in sources.items() if source and source.name == "COMMANDLINE"]
    given = [p.opts[0] for p in typed if p.name not in ("model", "report", "limit", "device")]
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot go with --report, which measures what the run's recipe is judged by and "
            "writes its own files."
        )
    with spinner("loading the run"):
        from recipes import report_page
        from recipes.finished_run import FinishedRun
        from recipes.report import report as measure
        from recipes.results import table

        finished = FinishedRun.load(run, device)
        folder.mkdir(parents=True, exist_ok=True)
    with spinner("measuring") as now:
        found = measure(finished.recipe, finished.student, finished.teacher, limit=limit, say=now)
    out.print(table(found.rows))
    results = report_page.results(found, finished.history, command_line(ctx))
    out.print(table([{"figure": name, "value": value} for name, value in results.figures.items()]))
    report_page.write(folder, finished.recipe, results)
    out.print(f"The report is in {folder / report_page.PAGE}.", markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs, the values as YAML."""
    import yaml

    fields = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, found {setting!r}.")
        try:
            fields[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: the value is not YAML: {error}.") from error
    return fields


def _bars(found: Evaluation) -> dict[str, float]:
    return {"all": found.accuracy, **{name: group.accuracy for name, group in found.groups.items()}}
