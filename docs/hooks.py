"""What mkdocs does besides Markdown: formulas, results from JSON, the command's help, and links in docstrings.

``python docs/hooks.py`` writes the demo's table into README.md, from docs/results/demo.json.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from recipes.bench.bars import BARS, best_at, summed
from recipes.bench.recovery import BY_STAGE
from recipes.report_page import COUNTED, sections
from recipes.results import Results, markdown_table, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
NOT_MEASURED = "Not measured yet: there is no `docs/results/demo.json`. `make demo` makes one."
KERNELS, TRIED = "ops_h100", "ops_tried"
FORM = "form"
"""What stands in the place of a measure for the forms of question, which are too many for columns."""

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>(~?)([\w.]+)</code>")
RECOVERY_TABLE = re.compile(r"^<!-- docs/results/(\w+)\.json -->$", re.MULTILINE)
README_TABLE = re.compile(r"(?<=<!-- docs/results/demo.json -->\n).*?(?=<!-- end -->)", re.DOTALL)


def on_config(config: Any) -> Any:
    """Draw ```math fences as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def mathml(source: str, *_: Any, **__: Any) -> str:
        return f"<p>{convert(source, display='block')}</p>"

    fences = [{"name": "math", "class": "math", "format": mathml}]
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the pages whose content is computed."""
    if page.file.src_uri == "quality.md":
        return quality_page(markdown)
    computed = {
        "results/index.md": results_page,
        "results/kernels.md": kernels_page,
        "guides/kernels.md": kernels_evidence,
        "reference/command.md": command_page,
    }
    make = computed.get(page.file.src_uri)
    return markdown if make is None else f"{markdown}\n\n{make()}"


def on_page_content(content: str, **_: Any) -> str:
    """Turn the cross-references of docstrings (:class:`~mixers.TokenLayout`) into links."""

    def link(match: re.Match[str]) -> str:
        short, target = match.groups()
        shown = target.rpartition(".")[2] if short else target
        return f'<autoref optional identifier="{target}"><code>{html.escape(shown)}</code></autoref>'

    return ROLE.sub(link, content)


def results_page(folder: Path = RESULTS) -> str:
    """Write every results file of a folder as Markdown, but for those that another page shows."""
    quality = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    elsewhere = {KERNELS, TRIED, *RECOVERY_TABLE.findall(quality)}
    parts = [NOT_MEASURED] if not (folder / "demo.json").exists() else []
    for path in sorted(folder.glob("*.json")):
        if path.stem in elsewhere:
            continue
        results = Results.read(path)
        parts.append(f"## {path.stem}")
        if path.with_suffix(".png").exists():
            parts.append(f"![{path.stem}]({path.stem}.png)")
        parts.append(
            markdown_table([{"figure": f"`{name}`", "value": v} for name, v in results.figures.items()])
        )
        if results.rows:
            parts.append(markdown_table(results.rows))
        parts.append(results.made_by)
    return "\n\n".join(parts)


def kernels_page(folder: Path = RESULTS) -> str:
    """Write what the kernels reach: the bars, the picture, ours and others' times, what is missing."""
    results = _read(folder, KERNELS)
    if results is None:
        return _absent(KERNELS)
    why = tried.figures if (tried := _read(folder, TRIED)) else {}
    bars = [
        {
            "what": bar.what,
            "figure": f"`{bar.figure}`",
            "bar": f"{'≥' if bar.higher else '≤'} {show(bar.bar)}",
            "stretch": "" if bar.stretch is None else show(bar.stretch),
            "measured": results.figures.get(bar.figure),
            "verdict": bar.verdict(results.figures.get(bar.figure)),
            "why": why.get(bar.figure, ""),
        }
        for bar in BARS
    ]
    speed = [row for row in results.rows if row["table"] == "speed" and row["tokens"]]
    missing = [row for row in results.rows if row["table"] == "speed" and row.get("note")]
    absent = list(dict.fromkeys((row["op"], row["by"], row["note"]) for row in missing))
    columns = ("op", "by", "tokens", "fwd_ms", "fwd_bwd_ms", "peak_mib", "bytes_ms", "products_ms", "error")
    parts = ["## What they must reach", markdown_table(bars)]
    if (folder / f"{KERNELS}.png").exists():
        parts.append(f"![{KERNELS}]({KERNELS}.png)")
    parts += ["## Beside the best correct peer and the limit", markdown_table(best_at(results.rows))]
    parts += ["## Every time", markdown_table([{key: row.get(key) for key in columns} for row in speed])]
    if absent:
        names = ("op", "by", "what is missing, and why")
        parts += ["## What is missing", markdown_table([dict(zip(names, row)) for row in absent])]
    machine = [row for row in results.rows if row["table"] == "machine"]
    parts += [
        "## The machine",
        markdown_table([{k: v for k, v in row.items() if k != "table"} for row in machine]),
    ]
    return "\n\n".join([*parts, results.made_by])


def kernels_evidence(folder: Path = RESULTS) -> str:
    """Write the errors of the kernels, and what was tried on the way to them."""
    results, tried = _read(folder, KERNELS), _read(folder, TRIED)
    checks = [row for row in results.rows if row["table"] == "check"] if results else []
    errors = [markdown_table(summed(checks)), results.made_by] if results and checks else [_absent(KERNELS)]
    story = [markdown_table(tried.rows), tried.made_by] if tried else [_absent(TRIED)]
    return "\n\n".join(["## Errors", *errors, "## What was tried, and what it gave", *story])


def quality_page(markdown: str, folder: Path = RESULTS) -> str:
    """Put what was measured of students in the place of each comment that names its file."""
    return RECOVERY_TABLE.sub(lambda match: recovery_tables(match[1], folder), markdown)


def recovery_tables(name: str, folder: Path = RESULTS) -> str:
    """Write what recipes recover of their teachers: a row a recipe in each table; or one run's whole report."""
    results = _read(folder, name)
    if results is None:
        return _absent(name)
    parts = [f"![{name}](results/{name}.png)"] if (folder / f"{name}.png").exists() else []
    if any("table" in row for row in results.rows):
        return "\n\n".join([*parts, *sections(results, level=3), results.made_by])
    rows = over_seeds(results.rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    figures = [{key: row.get(key) for key in keys if not _group(key)[0]} for row in rows]
    parts.append(markdown_table(figures, finely))
    for heading in dict.fromkeys(_group(key)[0] for key in keys):
        if heading:
            own = {key: group for key in keys for of, group in [_group(key)] if of == heading}
            known = [row for row in rows if any(key in row for key in own)]
            if heading.endswith(FORM):
                table = [
                    {"group: form": group} | {row["recipe"]: row.get(key) for row in known}
                    for key, group in own.items()
                ]
            else:
                table = [
                    {"recipe": row["recipe"]} | {group: row.get(key) for key, group in own.items()}
                    for row in known
                ]
            parts += [f"**{heading}**", markdown_table(table, finely)]
    return "\n\n".join([*parts, results.made_by])


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lay the rows of one recipe together: mean ± standard deviation where its seeds differ."""
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        seeds = sum(row.get("seed") is not None for row in own)
        values = {key: [row[key] for row in own if row.get(key) is not None] for row in own for key in row}
        merged = {key: _summed(those) for key, those in values.items() if key not in ("recipe", "seed")}
        found.append({"recipe": recipe, "seeds": seeds or None, **merged})
    return found


def finely(value: Any) -> str:
    """Format a value for a table whose rows are close together: numbers below 10 to three decimals."""
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 10 else show(value)


def _summed(values: list[Any]) -> Any:
    different = list(dict.fromkeys(values))
    if len(different) < 2:
        return different[0] if different else None
    if any(isinstance(value, str) for value in different):
        return "; ".join(map(str, different))
    return f"{finely(fmean(values))} ± {finely(stdev(values))}"


def _group(key: str) -> tuple[str, str]:
    """Split ``"text perplexity fortunes"`` into a table and its column; the first is empty for a single figure."""
    for measure in (*COUNTED, FORM):
        task, found, group = key.partition(f" {measure} ")
        if found:
            return f"{task}: {measure}", group
    name, _, stage = key.partition(" ")
    return (name.replace("_", " "), stage) if name in BY_STAGE and stage else ("", key)


def _read(folder: Path, name: str) -> Results | None:
    path = folder / f"{name}.json"
    return Results.read(path) if path.exists() else None


def _absent(name: str) -> str:
    return f"Not measured yet: there is no `docs/results/{name}.json`."


def command_page() -> str:
    """Write the help of ``linmu`` and of each of its commands as Markdown."""
    import typer

    from recipes.cli import app

    return "\n\n".join(_help("linmu", typer.main.get_command(app)))


def readme_table(folder: Path = RESULTS) -> str:
    """Write what the demo's student gains, at the longest prompt of each measure, or that it was not measured."""
    path = folder / "demo.json"
    if not path.exists():
        return NOT_MEASURED
    results = Results.read(path)
    longest = {row["measure"]: row for row in results.rows if None not in (row["teacher"], row["student"])}
    return f"{markdown_table(list(longest.values()))}\n\n`{results.command}` on {results.device}, {results.date[:10]}."


def _help(path: str, command: Any) -> Iterator[str]:
    yield f"## `{path}`"
    paragraphs = re.split(r"\n\s*\n", (command.help or "").strip())
    yield "\n\n".join(_plain(paragraph) for paragraph in paragraphs)
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    rows = [
        {
            "argument or option": f"`{'`, `'.join(_names(parameter))}`",
            "what": _plain(parameter.help or ""),
            "default": "" if parameter.default in (None, False) else f"`{parameter.default}`",
        }
        for parameter in shown
        if parameter.name != "help"
    ]
    if rows:
        yield markdown_table(rows)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _help(f"{path} {name}", inner)


def _names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.metavar or parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def _plain(text: str) -> str:
    """Take rich's style marks out of a help text; examples become code."""
    example = text.startswith(("[dim]linmu", "[bold]linmu"))
    text = re.sub(r"\[/?(?:bold|dim)?\]", "", text)
    return "\n".join(f"    {line.strip()}" for line in text.splitlines()) if example else text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(README_TABLE.sub(lambda _: f"{readme_table()}\n", readme.read_text()))
