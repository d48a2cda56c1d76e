"""Language modelling on named corpora, text files, or the documentation topics that ship with every Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.data.corpora import corpus
from recipes.data.task import Batch, Item, TaskError, UnsupportedModel
from recipes.data.tokens import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLittleText(TaskError, ValueError):
    """The text does not fill a single window of each split."""


class SharedCorpus(TaskError, ValueError):
    """A corpus would be trained on and judged by."""


class Windows(list[Item]):
    """Items of one length."""

    @property
    def sizes(self) -> list[int]:
        """How many tokens each has."""
        return [len(self[0]["input_ids"])] * len(self)


class Text:
    """Windows of tokens cut from documents that are laid end to end, with every token as its own label.

    The training text is that of ``corpora``, of ``files``, or without either ``pydoc_data.topics``, the
    reference pages behind Python's ``help()`` (PSF licence, about 0.7 MB). Its documents are shuffled. The test
    text is that of the corpora ``held_out``, or without them every ``holdout``-th document of the training
    text, which then is not trained on.

    Items are ``{"input_ids": Tensor [length]}``; those of the test split that come from a corpus have its name
    as ``"category"``, so that perplexity and agreement are also given for each corpus.

    Args:
        tokenizer: The model's tokenizer; its end token closes each document.
        files: Text files, UTF-8, one document each.
        corpora: Names of :data:`~recipes.data.corpora.CORPORA` to train on.
        held_out: Names of corpora that the test split is made of, whole.
        max_tokens: Tokens of a training corpus, at most, so that a large one does not outweigh the rest.
        length: Tokens of a window.
        holdout: Of how many documents one is held out, where no corpus is.
        max_new_tokens: Tokens to generate behind the first half of a window.
        seed: Of the shuffling.

    Raises:
        UnsupportedModel: The tokenizer has no end token.
        FileNotFoundError: A file does not exist.
        UnknownCorpus: There is no such corpus; near names are listed.
        SharedCorpus: A corpus is in both splits.
        MissingTool: A corpus is not in the cache, and cannot be fetched here; or another error of a fetch.
        TooLittleText: A split has not one window.
    """

    name = "text"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        files: Sequence[str | Path] | None = None,
        corpora: Sequence[str] | None = None,
        held_out: Sequence[str] = (),
        max_tokens: int | None = None,
        length: int = 512,
        holdout: int = 10,
        max_new_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UnsupportedModel("the tokenizer needs an end token: set eos_token")
        if length < 2 or holdout < 2 or not 1 <= max_new_tokens <= length // 2:
            raise ValueError(
                f"length and holdout must be at least 2 and max_new_tokens in 1…{length // 2}, half a window; found "
                f"length={length}, holdout={holdout}, max_new_tokens={max_new_tokens}"
            )
        if files is not None and corpora is not None:
            raise ValueError("the training text is that of files or of corpora: give one of them")
        if max_tokens is not None and corpora is None:
            raise ValueError("max_tokens limits each of corpora, and none is given; leave it out")
        if shared := sorted({*(corpora or ())} & {*held_out}):
            raise SharedCorpus(f"corpora and held_out both name {', '.join(shared)}; leave it out of one")
        self.tokenizer, self.length, self.max_new_tokens = tokenizer, length, max_new_tokens
        chosen, held = [corpus(name) for name in corpora or ()], [corpus(name) for name in held_out]
        sources: dict[str | None, list[Tensor]] = {}
        if corpora is None:
            texts = python_topics() if files is None else [Path(f).read_text(encoding="utf-8") for f in files]
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            sources[None] = [torch.tensor(document, dtype=torch.long) for document in ids]
        for one in chosen:
            sources[one.name] = _at_most(max_tokens, tokens(one, tokenizer))
        judged: dict[str | None, list[Tensor]] = {one.name: list(tokens(one, tokenizer)) for one in held}
        if not judged:
            judged = {name: found[holdout - 1 :: holdout] for name, found in sources.items()}
            for found in sources.values():
                del found[holdout - 1 :: holdout]
        kept = list(chain.from_iterable(sources.values()))
        Random(seed).shuffle(kept)
        self.train = Windows(self._windows(kept))
        self.test = [item for name, found in judged.items() for item in self._windows(found, name)]
        if not self.train or not self.test:
            raise TooLittleText(
                f"the documents give {len(self.train)} training and {len(self.test)} test windows of {length} tokens; "
                "give more or longer files, or a smaller length or holdout"
            )

    def _windows(self, documents: Sequence[Tensor], category: str | None = None) -> list[Item]:
        end = torch.tensor([self.tokenizer.eos_token_id])
        parts = [part for document in documents for part in (document, end)]
        stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        whole = stream[: len(stream) // self.length * self.length].view(-1, self.length)
        named = {} if category is None else {"category": category}
        return [{"input_ids": window, **named} for window in whole]

    def collate(self, items: Sequence[Item]) -> Batch:
        """Stack windows: ``input_ids``, ``attention_mask`` and ``labels`` [B, length]."""
        input_ids = torch.stack([item["input_ids"] for item in items])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": input_ids.clone(),
        }

    def prompts(self, items: Sequence[Item]) -> Batch:
        """The first halves of windows."""
        input_ids = torch.stack([item["input_ids"][: self.length // 2] for item in items])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """Fraction of the window's next ``max_new_tokens`` ids that were generated in their places."""
        start = self.length // 2
        truth = item["input_ids"][start : start + self.max_new_tokens]
        shown = generated_ids[: len(truth)].to(truth.device)
        return float((shown == truth[: len(shown)]).sum()) / len(truth)


def _at_most(limit: int | None, documents: Sequence[Tensor]) -> list[Tensor]:
    """The first documents that have no more tokens than that together."""
    ends = accumulate(map(len, documents))
    return [document for document, end in zip(documents, ends) if limit is None or end <= limit]


def python_topics() -> list[str]:
    """The pages of ``pydoc_data.topics``, by title."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]
