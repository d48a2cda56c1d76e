"""Conversations with the teacher as a dataset to distil on, and requests to compare two models by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from recipes.data.dialogue import TEACHER, chats_path, check_template, prompt_ids
from recipes.data.requests import Requests
from recipes.data.task import IGNORED, Batch, Item, MadeItems, TaskError, pad
from recipes.data.tokens import Tokens, read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NoChats(TaskError, FileNotFoundError):
    """The chats of that teacher and seed have not been made."""


class NoRightAnswer(TaskError, TypeError):
    """Answers of a chat cannot be scored."""


class Conversations(MadeItems):
    """The training split: whole conversations, cut at so many tokens."""

    def __init__(self, stored: Tokens, length: int) -> None:
        self.stored, self.length = stored, length

    def __len__(self) -> int:
        return len(self.stored) // 2

    def item(self, place: int) -> Item:
        """The conversation at a place, and how many of its tokens are the first prompt."""
        prompt, rest = self.stored[2 * place], self.stored[2 * place + 1]
        return {
            "input_ids": torch.cat([prompt, rest])[: self.length],
            "prompt": min(len(prompt), self.length),
        }

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each item."""
        ends = self.stored.ends[1::2]
        return ends.diff(prepend=ends.new_zeros(1)).clamp(max=self.length).tolist()


class Prompts(MadeItems):
    """The test split: requests about held-out corpora, up to where the answer begins."""

    def __init__(self, requests: Requests, size: int) -> None:
        self.requests, self.size = requests, size

    def __len__(self) -> int:
        return self.size

    def item(self, place: int) -> Item:
        """The request with that number."""
        request = self.requests.make(place)
        ids = prompt_ids(self.requests.tokenizer, request)
        return {"input_ids": torch.tensor(ids), "prompt": len(ids), "category": request.kind}


class Chats:
    """Chats of a teacher about all that its users may ask, on texts of the corpora or on nothing but the question.

    The training split are conversations of one or two turns whose answers the teacher gave, sampled;
    ``linmu data chats`` lets it. Their excerpts are of the corpora to train on. The test split are requests about
    excerpts of the held-out corpora, to be answered by two models that are compared (`agreement`); it needs no
    conversations.

    Items are ``{"input_ids": Tensor [N], "prompt"}``, with ``prompt`` the number of tokens before the first
    answer; those of the test split end there, and have the kind of request as ``"category"``.

    Args:
        tokenizer: The model's tokenizer.
        teacher: Who answered, as it was named to ``linmu data chats``.
        seed: Of the requests, as it was given there.
        length: Tokens of a training item, at most; longer conversations are cut.
        test_size: Requests of the test split.
        max_new_tokens: Tokens to answer them with.

    Raises:
        UnsupportedModel: The tokenizer has no end token, or no chat template for such conversations.
        NoChats: From ``train``, where the conversations are not in the cache.
        recipes.data.task.TaskError: From ``test``, where the tokens of held-out corpora cannot be had.
    """

    name = "chats"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher: str = TEACHER,
        seed: int = 0,
        length: int = 1024,
        test_size: int = 200,
        max_new_tokens: int = 64,
    ) -> None:
        if min(length, test_size, max_new_tokens) < 1:
            raise ValueError(
                f"length, test_size and max_new_tokens must be at least 1; found length={length}, "
                f"test_size={test_size}, max_new_tokens={max_new_tokens}"
            )
        check_template(tokenizer)
        self.tokenizer, self.teacher, self.seed = tokenizer, teacher, seed
        self.length, self.test_size, self.max_new_tokens = length, test_size, max_new_tokens
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.pad_id: int = end if padding is None else padding

    @cached_property
    def train(self) -> Conversations:
        """Conversations from the cache."""
        path = chats_path(self.tokenizer, self.teacher, self.seed)
        if not path.is_file():
            raise NoChats(
                f"there are no chats of {self.teacher} with seed {self.seed} in {path.parent}: make them by `linmu "
                f"data chats --teacher {self.teacher} --seed {self.seed}` (minutes on a GPU), or put the folder of "
                "another machine there"
            )
        return Conversations(read_tokens("chats", path), self.length)

    @cached_property
    def test(self) -> Prompts:
        """Requests about held-out corpora."""
        return Prompts(Requests(self.tokenizer, "test", self.seed), self.test_size)

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch, right-padded; ``labels`` [B, N] are all tokens, -100 in the padding."""
        rows = [item["input_ids"].tolist() for item in items]
        return {**self._batch(rows, "right"), "labels": pad(rows, IGNORED, "right")}

    def prompts(self, items: Sequence[Item]) -> Batch:
        """What stands before the first answer, left-padded."""
        return self._batch([item["input_ids"][: item["prompt"]].tolist() for item in items], "left")

    def _batch(self, rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> Batch:
        return {
            "input_ids": pad(rows, self.pad_id, side),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
        }

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """Refuse.

        Raises:
            NoRightAnswer: Always: no answer to such a request is the right one.
        """
        raise NoRightAnswer(
            "no answer of a chat is the right one, so chats have no accuracy: judge by agreement with the teacher "
            "(`judged_by: [{task: chats, measures: [agreement]}]`), and by the accuracy of other datasets"
        )
