"""Every example of README, CONTRIBUTING and the site runs, prints what the page says, and is a real command.

Python blocks of a page share a namespace and run in order; a ``text`` block after one is what it prints. They run in
a folder that holds, under the hub's name, a tiny random model of the class that the examples load.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from bridges.families import family
from mixers import registry
from recipes.cli import app
from recipes.plan import Recipe
from recipes.tiny_vlm.build import build_model, build_tokenizer
from tests.docs.pages import PAGE_NAMES, PAGES, blocks, blocks_of

HUB_NAME = "Qwen/Qwen2.5-VL-3B-Instruct"

each_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the hub's name is a tiny random model."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder / HUB_NAME)
    tokenizer.save_pretrained(folder / HUB_NAME)
    return folder


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Forget mixers and families that an example registers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        patch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
        yield


@each_page
def test_python_examples_run(
    page: Path, stand_in: Path, unregistered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stand_in)
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = blocks(page)
    for block, following in pairwise([*found, None]):
        if block is None or block.language != "python" or block.why_not:
            continue
        printed = io.StringIO()
        # Newlines before it, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if following is not None and following.language == "text":
            assert printed.getvalue().strip() == following.body.strip(), f"{page}:{following.line}"


@each_page
def test_commands_exist_and_take_their_options(page: Path) -> None:
    for block in blocks_of(page, "bash"):
        for line in block.body.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "linmu":
                asked = _help_of(words[1:])
                assert asked.exit_code == 0, f"{page}:{block.line}: {line}\n{asked.output}"


@each_page
def test_yaml_recipes_are_valid(page: Path) -> None:
    for block in blocks_of(page, "yaml"):
        fields = yaml.safe_load(block.body)
        if "stages" in fields:
            assert Recipe.from_dict(fields).stages


@each_page
def test_blocks_that_are_not_run_say_what_they_need(page: Path) -> None:
    for block in blocks(page):
        if block.why_not:
            assert "needs" in block.why_not, f"{page}:{block.line}: say what running it needs"


@pytest.mark.parametrize("line", ["linmu distill tiny-vlm --no-such-option", "linmu no-such-command"])
def test_a_wrong_command_is_noticed(line: str) -> None:
    assert _help_of(shlex.split(line)[1:]).exit_code == 2


def _help_of(words: list[str]) -> Any:
    """Ask a command line for its help: its command and its options are looked up, nothing is run."""
    return CliRunner().invoke(app, [*words, "--help"])
