"""A report as files: ``report.json`` with every number, and a page and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes import plots
from recipes.plan import Recipe
from recipes.report import Report
from recipes.results import Results, Row, first_and_last, markdown_table, spent, write_atomically

COUNTED = {"accuracy": "questions", "agreement": "tokens", "perplexity": "tokens"}
"""Measure → what it is taken over."""

SHOWN = ("group", "form", "teacher", "student", "recovery", "trivial", "above_trivial")
"""What the page shows of a row of scores, besides the count."""

PAGE, PICTURE, NUMBERS = "report.md", "report.png", "report.json"


def results(report: Report, history: Sequence[Row], command: str) -> Results:
    """Put a report and the losses on the way to it into the form of a results file.

    Args:
        report: What was measured.
        history: The run's log entries.
        command: The command line that asked for it.

    Returns:
        The report's figures, ``minutes`` and ``tokens`` of all stages together; each row names its ``table``:
        ``scores``, ``forms``, ``layers`` or ``history``.
    """
    cost = spent(history)
    sums: dict[str, Any] = {name: sum(row[name] for row in cost) for name in ("minutes", "tokens")}
    tables = {"scores": report.rows, "forms": report.forms, "layers": report.layers, "history": history}
    rows = [{"table": name, **row} for name, rows in tables.items() for row in rows]
    return Results(command, {**report.figures, **sums}, rows)


def write(folder: Path | str, recipe: Recipe, found: Results) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``.

    Args:
        folder: Made if it is not there.
        recipe: What was run.
        found: From :func:`results`.

    Raises:
        recipes.plots.PlotError: Matplotlib is missing; the other two files are there then.
    """
    folder = Path(folder)
    found.write(folder / NUMBERS)
    write_atomically(folder / PAGE, page(recipe, found))
    title = f"{recipe.name}: student beside teacher"
    plots.report(
        folder / PICTURE, title, rows_of(found, "scores"), rows_of(found, "layers"), rows_of(found, "history")
    )


def page(recipe: Recipe, found: Results) -> str:
    """Write a report as Markdown.

    Args:
        recipe: What was run.
        found: From :func:`results`.
    """
    parts = [f"# {recipe.name}: student beside teacher", recipe.description]
    parts += [f"![recovery, errors of layers, losses]({PICTURE})", *sections(found), "## How it was made"]
    parts += [markdown_table(spent(rows_of(found, "history"))), found.made_by]
    parts += [f"```yaml\n{recipe.to_yaml()}```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(found: Results, level: int = 2) -> list[str]:
    """Write the tables of a report as Markdown: its figures, the scores by task, the layers, the losses.

    Args:
        found: From :func:`results`, or read from its file.
        level: Of the headings.
    """
    mark = "#" * level
    parts = [
        f"{mark} Figures",
        markdown_table([{"figure": f"`{n}`", "value": v} for n, v in found.figures.items()]),
    ]
    scores, forms = rows_of(found, "scores"), rows_of(found, "forms")
    for task, measure in dict.fromkeys((row["task"], row["measure"]) for row in scores):
        columns = {key: key for key in SHOWN} | {"count": COUNTED[measure]}
        for title, rows in ((measure, scores), (f"{measure} by form of question", forms)):
            own = [row for row in rows if (row["task"], row["measure"]) == (task, measure)]
            shown = [{name: row[key] for key, name in columns.items() if key in row} for row in own]
            parts += [f"{mark} {task}: {title}", markdown_table(shown)] if own else []
    if layers := rows_of(found, "layers"):
        parts += [f"{mark} Errors of layers"]
        parts += [
            "`injected`: of the mixer's output, on the teacher's input; `chained`: of the stream after the layer. "
            "Squared, as fractions of the teacher's squared size. `attention`: divergence of the weights by which text "
            "looks at what stands before it. A layer that is far off there is one to keep as it was, if any is."
        ]
        parts += [markdown_table(layers)]
    if history := rows_of(found, "history"):
        parts += [f"{mark} Losses", markdown_table(first_and_last(history))]
    return parts


def rows_of(found: Results, table: str) -> list[dict[str, Any]]:
    """Return the rows of one of a results file's tables, without the key that names it."""
    own = (row for row in found.rows if row.get("table") == table)
    return [{key: value for key, value in row.items() if key != "table"} for row in own]
