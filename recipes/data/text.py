"""Language modelling on text files, or on the documentation topics that ship with every Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.data.task import Batch, Item, TaskError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLittleText(TaskError, ValueError):
    """The text does not fill a single window of each split."""


class Text:
    """Windows of tokens cut from documents that are laid end to end, with every token as its own label.

    Whole documents are held out for the test split, every ``holdout``-th one. Without files the text is
    ``pydoc_data.topics``, the reference pages behind Python's ``help()`` (PSF licence, about 0.7 MB).

    Items are ``{"input_ids": Tensor [length]}``.

    Args:
        tokenizer: The model's tokenizer; its end token closes each document.
        files: Text files, UTF-8, one document each.
        length: Tokens of a window.
        holdout: Of how many documents one is held out.
        max_new_tokens: Tokens to generate behind the first half of a window.

    Raises:
        UnsupportedModel: The tokenizer has no end token.
        FileNotFoundError: A file does not exist.
        TooLittleText: A split has not one window.
    """

    name = "text"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        files: Sequence[str | Path] | None = None,
        length: int = 512,
        holdout: int = 10,
        max_new_tokens: int = 32,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UnsupportedModel("the tokenizer needs an end token: set eos_token")
        if length < 2 or holdout < 2 or not 1 <= max_new_tokens <= length // 2:
            raise ValueError(
                f"length and holdout must be at least 2 and max_new_tokens in 1…{length // 2}, half a window; found "
                f"length={length}, holdout={holdout}, max_new_tokens={max_new_tokens}"
            )
        self.tokenizer, self.length, self.max_new_tokens = tokenizer, length, max_new_tokens
        documents = python_topics() if files is None else [Path(f).read_text(encoding="utf-8") for f in files]
        ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
        held_out = ids[holdout - 1 :: holdout]
        kept = [document for i, document in enumerate(ids) if (i + 1) % holdout]
        self.train, self.test = self._windows(kept), self._windows(held_out)
        if not self.train or not self.test:
            raise TooLittleText(
                f"{len(documents)} documents give {len(self.train)} training and {len(self.test)} test windows of "
                f"{length} tokens; give more or longer files, or a smaller length or holdout"
            )

    def _windows(self, documents: Iterable[list[int]]) -> list[Item]:
        end = [self.tokenizer.eos_token_id]
        stream = torch.tensor(
            list(chain.from_iterable(document + end for document in documents)), dtype=torch.long
        )
        whole = stream[: len(stream) // self.length * self.length].view(-1, self.length)
        return [{"input_ids": window} for window in whole]

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


def python_topics() -> list[str]:
    """The pages of ``pydoc_data.topics``, by title."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]
