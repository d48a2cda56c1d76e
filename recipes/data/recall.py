"""Recall at a distance: copying, looking up, reading and counting in generated texts of a given length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from mixers.errors import near
from recipes.data.problems import KINDS, MOST, PASSAGE, WORDS, Problem
from recipes.data.task import IGNORED, Batch, Item, MadeItems, TaskError, UnsupportedModel, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOLDOUT = 4
"""Of how many words one is kept for the test split."""

FEWEST = 40
"""Words that a list must have."""

TOLERANCE = 0.1
"""How far a prompt may be from the length asked for, as a fraction of it."""


KEPT = 4096
"""Test problems that are kept once they are made, at most."""


class UnknownKind(TaskError, ValueError):
    """No kind of problem has that name."""


class BadWords(TaskError, ValueError):
    """The word list is too short, or has entries that are no words."""


class BadLength(TaskError, ValueError):
    """A prompt of that length cannot be made."""


class Problems(MadeItems):
    """One split: ``size`` problems of each kind at each length, the shortest first, each made when asked for.

    Every evaluation asks for the same ones of the test split, so these are kept.
    """

    def __init__(self, task: Recall, words: Sequence[str], split: str, size: int) -> None:
        self.task, self.words, self.split, self.size = task, words, split, size
        self.groups = list(product(task.lengths, task.kinds))
        self._kept: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.groups) * self.size

    def item(self, place: int) -> Item:
        """The problem at a place of the split."""
        if place in self._kept:
            return self._kept[place]
        group, number = divmod(place, self.size)
        length, kind = self.groups[group]
        made = self.make(kind, length, number)
        if self.split == "test" and len(self._kept) < KEPT:
            self._kept[place] = made
        return made

    @property
    def sizes(self) -> list[int]:
        """About how many tokens each problem has."""
        return [length for length, _ in self.groups for _ in range(self.size)]

    def make(self, kind: str, length: int, number: int) -> Item:
        """The problem with that number among those of one kind and length.

        Raises:
            TooFewWords: There are too few keys for a text of this length.
        """
        seed = f"{self.task.seed} {self.split} {kind} {length} {number}"
        every = self.task.answer_every if self.split == "train" else None
        answered = 1 if every is None else max(1, length // every)

        def problem(units: int) -> Problem:
            return KINDS[kind](self.words, units, Random(seed), answered)

        two, units, tried = self.task.length(problem(2)), 9, dict[int, int]()
        while units not in tried:  # what a unit weighs is known better the nearer the text is to its length
            tried[units] = self.task.length(problem(units))
            per_unit = (tried[units] - two) / (units - 2)
            units = max(3, 2 + round((length - two) / per_unit))
        nearest = min(tried, key=lambda size: abs(tried[size] - length))
        tried.update({size: self.task.length(problem(size)) for size in (nearest - 1, nearest + 1)})
        nearest = min(tried, key=lambda size: abs(tried[size] - length))
        return {"kind": kind, "length": length, "category": f"{kind} {length}", **problem(nearest)._asdict()}


class Recall:
    """Problems that need recall at a distance, generated for any tokenizer.

    Kinds: ``copy`` goes on with one of many passages, by 8 words, ``lookup`` gives the value of a key among
    many, ``document`` answers a question that one sentence of a longer text answers, and ``count`` tells how
    often a word occurs in a list, 1 to 9 times.

    The prompt is the text, another question on it with its answer, and the question, in the tokenizer's chat
    template if it has one, and the beginning of the reply, so that nothing but the answer is left to say:
    ``… What is the value of the key cedar owl?`` … ``cedar owl:`` → ``lantern``. In training there may be more
    answered questions on a text, for the same reading teaches more then. Every fourth word is kept for
    the test split, whatever the seed: keys, values, passages and lists of the two splits share no word.

    Items are ``{"kind", "length", "category", "question", "lead", "answer"}``; evaluation groups them by the
    category, such as ``"lookup 1024"``. They are a function of the options, not of the order of access.

    Args:
        tokenizer: The model's tokenizer; its end token closes an answer.
        kinds: Which of the four.
        lengths: Tokens of a prompt, chat template included, met within 10 %.
        train_size: Training problems of each kind at each length.
        test_size: Test problems of each kind at each length.
        seed: Of all draws.
        words: Text file of words to write with, UTF-8, apart by white space. None: about 350 everyday nouns.
        answer_every: Training problems have an answered question for every so many tokens of their length. None:
            one, as the test's have.

    Raises:
        UnsupportedModel: The tokenizer has no end token, or loses words.
        UnknownKind: There is no such kind; near names are listed.
        BadWords: The file has fewer than 40 different words, or words with other characters than letters.
        TooFewWords: The words give too few keys for the longest length.
        BadLength: A prompt as short as the shortest length cannot be made.
        FileNotFoundError: The file does not exist.
    """

    name = "recall"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kinds: Sequence[str] = tuple(KINDS),
        lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192),
        train_size: int = 500,
        test_size: int = 20,
        seed: int = 0,
        words: str | Path | None = None,
        answer_every: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UnsupportedModel("the tokenizer needs an end token: set eos_token")
        for kind in kinds:
            if kind not in KINDS:
                raise UnknownKind(
                    f"recall has no kind {kind!r}.{near(kind, KINDS)} Its kinds: {', '.join(KINDS)}."
                )
        if not kinds or not lengths or min(lengths) < 1 or train_size < 1 or test_size < 1:
            raise ValueError(
                "recall needs a kind, a length, and lengths and sizes of at least 1; found "
                f"kinds={list(kinds)}, lengths={list(lengths)}, train_size={train_size}, test_size={test_size}"
            )
        if answer_every is not None and answer_every < 1:
            raise ValueError(f"answer_every is a number of tokens, at least 1; found {answer_every}")
        self.tokenizer, self.seed, self.answer_every = tokenizer, seed, answer_every
        self.kinds, self.lengths = tuple(dict.fromkeys(kinds)), sorted(set(lengths))
        listed = word_list(WORDS if words is None else Path(words).read_text(encoding="utf-8"))

        self.end = tokenizer.eos_token_id
        self.pad_id = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.chat = tokenizer.chat_template is not None
        begins = not self.chat and tokenizer.bos_token_id in tokenizer("")["input_ids"]
        self.begin = [tokenizer.bos_token_id] if begins else []
        self.max_new_tokens = 1 + self._longest(listed) * (PASSAGE if "copy" in self.kinds else 1)

        held_out = listed[HOLDOUT - 1 :: HOLDOUT]
        kept = [word for i, word in enumerate(listed) if (i + 1) % HOLDOUT]
        self.train = Problems(self, kept, "train", train_size)
        self.test = Problems(self, held_out, "test", test_size)
        for split, kind in product((self.train, self.test), self.kinds):
            for wanted in {self.lengths[0], self.lengths[-1]}:
                self._check_length(split.make(kind, wanted, 0), wanted)

    def _longest(self, words: Sequence[str]) -> int:
        """Tokens of the longest word or count, if all of them are read from their tokens again."""
        answers = [*words, *map(str, range(1, MOST + 1))]
        ids = self._ids([f" {answer}" for answer in answers])
        lost = [answer for answer, own in zip(answers, ids) if self._said(own) != [answer]]
        if lost:
            raise UnsupportedModel(
                f"the tokenizer does not give back {len(lost)} of {len(answers)} words from their tokens "
                f"({', '.join(lost[:5])}): give a file of words that it knows"
            )
        return max(map(len, ids))

    def _check_length(self, item: Item, wanted: int) -> None:
        found = len(self._prompt_ids([item])[0])
        if abs(found - wanted) > TOLERANCE * wanted:
            raise BadLength(
                f"a prompt of {wanted} tokens cannot be made for the kind {item['kind']!r}: with this tokenizer "
                f"the nearest has {found}; ask for greater lengths, or leave the kind out"
            )

    def length(self, problem: Problem) -> int:
        """Tokens of a problem's prompt."""
        return len(self._prompt_ids([problem._asdict()])[0])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _prompt_ids(self, items: Sequence[Item]) -> list[list[int]]:
        prompts = [self._prompt(item["question"]) + item["lead"] for item in items]
        return [self.begin + ids for ids in self._ids(prompts)]

    def _prompt(self, question: str) -> str:
        if not self.chat:
            return f"{question}\n\n"
        turns = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def _batch(self, rows: Sequence[list[int]], side: Literal["left", "right"]) -> Batch:
        return {
            "input_ids": pad(rows, self.pad_id, side),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
        }

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch, right-padded; ``labels`` [B, N] is -100 except on the answer and its end token."""
        prompts = self._prompt_ids(items)
        answers = [[*ids, self.end] for ids in self._ids([f" {item['answer']}" for item in items])]
        labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers)]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
        return {**self._batch(rows, "right"), "labels": pad(labels, IGNORED, "right")}

    def prompts(self, items: Sequence[Item]) -> Batch:
        """Inputs of ``generate()``, left-padded."""
        return self._batch(self._prompt_ids(items), "left")

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """How much of the answer the generated ids [N] say, from 0 to 1.

        What counts is said before the end token, the first full stop or the first line's end; case, white
        space and other punctuation do not matter. A copy scores the fraction of its words that stand in their
        places, words too many counting as wrong ones; every other kind scores 1.0 if the words are the
        answer's, else 0.0.
        """
        said, truth = self._said(generated_ids.tolist()), item["answer"].split()
        if item["kind"] != "copy":
            return float(said == truth)
        return sum(a == b for a, b in zip(said, truth)) / max(len(said), len(truth))

    def _said(self, ids: list[int]) -> list[str]:
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip().casefold()
        return re.findall(r"\w+", re.split(r"[.\n]", text)[0])


def word_list(text: str) -> list[str]:
    """The different words of a text, in lower case and sorted.

    Raises:
        BadWords: There are fewer than 40, or some are not of letters alone.
    """
    words = sorted(set(text.casefold().split()))
    strange = [word for word in words if not word.isalpha()]
    if strange:
        raise BadWords(
            f"a word list has letters only, but {len(strange)} entries do not: {', '.join(strange[:5])}; remove them"
        )
    if len(words) < FEWEST:
        raise BadWords(f"recall needs at least {FEWEST} different words; found {len(words)}: give more")
    return words
