"""Tokens of all corpora in a cache folder, made of nouns: one half of them to train on, the other held out."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

from recipes.data.corpora import CORPORA
from recipes.data.problems import WORDS
from recipes.data.tokens import tokens_path, write_tokens

NOUNS = sorted(WORDS.split())
OF = {"train": NOUNS[::2], "test": NOUNS[1::2]}
"""Split → the nouns that its corpora are made of."""


def sentence(nouns: list[str], random: Random) -> str:
    return " ".join(random.choices(nouns, k=8)).capitalize() + "."


def document(nouns: list[str], random: Random) -> str:
    """Glosses, and paragraphs with headings."""
    glosses = [f"{random.choice(nouns)} (noun): {sentence(nouns, random)[:-1]}" for _ in range(8)]
    paragraphs = [" ".join(sentence(nouns, random) for _ in range(3)) for _ in range(8)]
    headings = [" ".join(random.choices(nouns, k=2)).capitalize() for _ in paragraphs]
    pages = [f"{heading}\n\n{paragraph}" for heading, paragraph in zip(headings, paragraphs)]
    return "\n\n".join(["\n".join(glosses), *pages])


def texts() -> dict[str, list[str]]:
    """Name of a corpus → its documents."""
    return {
        name: [document(OF["test" if one.held_out else "train"], Random(f"{name} {i}")) for i in range(3)]
        for name, one in CORPORA.items()
    }


def fill(folder: Path, tokenizer, monkeypatch) -> None:
    """Make it the cache folder, with the tokens in it."""
    monkeypatch.setenv("LINMU_CACHE", str(folder))
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    for name, documents in texts().items():
        rows = [torch.tensor(ids) for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]]
        write_tokens(tokens_path(CORPORA[name], tokenizer), rows, {"corpus": name}, tokenizer)
