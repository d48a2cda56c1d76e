"""What users ask: about an excerpt of a corpus, which the question quotes, about topics, and for writing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from recipes.data.corpora import CORPORA, Corpus
from recipes.data.problems import WORDS
from recipes.data.recall import HOLDOUT, word_list
from recipes.data.task import TaskError
from recipes.data.tokens import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

REVISION = 1
"""Counts the changes of what is asked, so that answers to older requests are not used."""

SIZES = (60, 350)
"""Tokens of an excerpt."""

TRIES = 1000
"""Places of the corpora that are looked at for one request."""

ABOUT_A_TEXT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "summary": (
            "Summarize this text.",
            "Give me a summary in two or three sentences.",
            "What is this about? Answer briefly.",
            "tl;dr please",
        ),
        "points": (
            "List the main points.",
            "What are the three most important facts here? Use bullet points.",
            "Turn this into a short numbered list.",
        ),
        "explanation": (
            "Explain this in simple words.",
            "How would you explain this to a child?",
            "I don't understand this. Can you help?",
            'What is meant by "{word}" here?',
        ),
        "answer": (
            "What does the text say about {word}?",
            "Ask a question about this text, and then answer it.",
            "Write three questions that this text answers, each with its answer.",
            "Why is {word} mentioned here?",
        ),
        "continuation": (
            "Continue this text.",
            "What could come next? Write the next paragraph.",
            "Go on from where this stops, in the same style.",
        ),
        "rewriting": (
            "Rewrite this in a friendly tone.",
            "Put this into your own words.",
            "Make this shorter without losing anything important.",
            "Rewrite this as a letter to a friend.",
        ),
        "quotation": (
            "Repeat the first sentence of the text, word for word.",
            'Which sentence of the text contains "{word}"? Quote it.',
            "Quote the most important sentence of the text.",
            "What is the first word of the text, and what is the last one?",
        ),
        "names": (
            "Which people, places or things are named in this text? List them.",
            "Extract the technical terms, each with a short definition.",
            "List all names and numbers that occur in the text.",
        ),
    }
)
"""Kind of request → how it is asked."""

FRAMES = (
    "{ask}\n\n{text}",
    "{text}\n\n{ask}",
    "Here is a text:\n\n{text}\n\n{ask}",
    '{ask}\n\n"""\n{text}\n"""',
    "Text:\n{text}\n\nTask: {ask}",
)
"""Where the excerpt stands."""

QUESTIONS = (
    'What does "{topic}" mean?',
    "Explain {topic}.",
    "What do you know about {topic}?",
    'Define "{topic}" and give an example.',
    "Write a short article about {topic}.",
)

WRITING = (
    "Write a short story with the words {one} and {other} in it.",
    'Write a poem with the title "The {one}".',
    "How are {one} and {other} alike, and how do they differ?",
    "Use the word {one} in three sentences.",
    "Tell me five facts about the word {one}.",
    "Give me some ideas for a party with the theme {one}.",
)

KINDS = (*ABOUT_A_TEXT, "question", "writing")
"""All kinds of requests, as often as one another."""

SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a patient teacher.",
    "You are an editor who cares about clear language.",
    "Answer in plain English, without any markup.",
    "Do what the user asks for, and add nothing.",
)
WITH_SYSTEM = 0.25
"""The part of the requests that begin with one of them."""

FOLLOW_UPS = (
    "Shorter, please.",
    "Say that in one sentence.",
    "Give an example.",
    "Thanks. What else should I know?",
    "Can you explain that in more detail?",
    "Are you sure? Check it again.",
)
FOLLOW_UPS_ON_THE_TEXT = (
    "Now repeat the first sentence of the text.",
    "What is the last sentence of the text?",
    "And what does the text say about {word}?",
    "Which word of the text is the most important one?",
)
WITH_FOLLOW_UP = 0.3
"""The part of the requests that have a second turn."""

BREAK = re.compile(
    r"""(?<!\d)(?<!\b[A-Z])[.!?]["')\]]*\s+(?=["'(*]*[A-Z])  # a new sentence, not the end of a number or name
    |   \n\n+                                                 # a new paragraph
    |   \n(?=[^\n]{1,80}\ \((?:noun|verb|adj|adv)\):\ )       # a new gloss""",
    re.VERBOSE,
)
"""Where an excerpt may begin and end."""

HEADINGS = re.compile(
    r"""^(?:(\S+\ [^\n]{2,60})\n([=~*^-])\2{2,}$               # reStructuredText, underlined
    |   =head\d\ (\S+\ [^\n]{2,60})$                           # POD
    |   ([^\n(:,]{3,40})[^\n(:]*\ \((?:noun|verb|adj|adv)\):\   # WordNet
    |   (\w[\w' -]{2,40})\ \\[^\n]*\\                          # GCIDE, before the pronunciation
    |   ([^\n]{3,40})\n\ /[^\n]+/,                              # the Jargon File, the same
    |   (?<=\n\n)(?:\d[\d.]*\ )?([A-Z]\S*\ [^\n]{2,60})\n\n)  # a page, numbered or not
    """,
    re.VERBOSE | re.MULTILINE,
)
"""Topics that a text is about, by the marks of its corpus."""


class NoExcerpt(TaskError, ValueError):
    """The corpora hold too little running text, or no heading."""


@dataclass(frozen=True)
class Request:
    """What a user says in a conversation.

    Attributes:
        kind: One of :data:`KINDS`.
        turns: What stands before the first answer, as a chat template takes it: a system prompt or not, the request.
        follow_up: What is said to that answer, if anything.
    """

    kind: str
    turns: tuple[dict[str, str], ...]
    follow_up: str | None


def corpora_of(split: Split) -> list[Corpus]:
    """The corpora that a split quotes: those that are held out for the test split, the others for training."""
    return [one for one in CORPORA.values() if one.held_out == (split == "test")]


class Requests:
    """Requests of a split by number: a function of seed, split and number.

    Nouns to write about are those of `recall`, every fourth kept for the test split as there.

    Args:
        tokenizer: Whose cached tokens of the corpora are read back to text.
        split: ``"train"`` or ``"test"``.
        seed: Of all draws.

    Raises:
        recipes.data.task.TaskError: The tokens of a corpus are not in the cache, and cannot be made here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: Split, seed: int = 0) -> None:
        self.tokenizer, self.split, self.seed = tokenizer, split, seed
        self.corpora = [tokens(one, tokenizer) for one in corpora_of(split)]
        nouns = word_list(WORDS)
        self.nouns = [noun for i, noun in enumerate(nouns, 1) if (i % HOLDOUT == 0) == (split == "test")]

    def make(self, number: int) -> Request:
        """The request with that number.

        Raises:
            NoExcerpt: The corpora have none that could be asked about.
        """
        random = Random(f"{self.seed} {self.split} {number}")
        kind = random.choice(KINDS)
        follow_ups: tuple[str, ...] = FOLLOW_UPS
        word = ""
        if kind == "question":
            content = random.choice(QUESTIONS).format(topic=self._topic(random))
        elif kind == "writing":
            one, other = random.sample(self.nouns, 2)
            content = random.choice(WRITING).format(one=one, other=other)
        else:
            text = self._excerpt(random)
            word = random.choice(long_words(text))
            ask = random.choice(ABOUT_A_TEXT[kind]).format(word=word)
            content = random.choice(FRAMES).format(ask=ask, text=text)
            follow_ups += FOLLOW_UPS_ON_THE_TEXT
        turns = [{"role": "user", "content": content}]
        if random.random() < WITH_SYSTEM:
            turns.insert(0, {"role": "system", "content": random.choice(SYSTEM)})
        follow_up = random.choice(follow_ups).format(word=word) if random.random() < WITH_FOLLOW_UP else None
        return Request(kind, tuple(turns), follow_up)

    def _excerpt(self, random: Random) -> str:
        """Whole sentences, paragraphs or entries of running text."""
        for _ in range(TRIES):
            text = between_breaks(self._passage(random, random.randint(*SIZES)))
            size = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if SIZES[0] <= size <= SIZES[1] and is_prose(text):
                return text
        raise NoExcerpt(
            f"{TRIES} places of the corpora {', '.join(one.corpus for one in self.corpora)} gave no running text of "
            f"{SIZES[0]} to {SIZES[1]} tokens; delete their tokens to make them again"
        )

    def _topic(self, random: Random) -> str:
        for _ in range(TRIES):
            found = topics(self._passage(random, SIZES[1]))
            if found:
                return random.choice(found)
        raise NoExcerpt(
            f"{TRIES} places of the corpora {', '.join(one.corpus for one in self.corpora)} had no heading; delete "
            "their tokens to make them again"
        )

    def _passage(self, random: Random, size: int) -> str:
        """So many tokens of a document, or all that it has."""
        documents = random.choice(self.corpora)
        document = documents[random.randrange(len(documents))]
        start = random.randrange(max(1, len(document) - size))
        return str(self.tokenizer.decode(document[start : start + size].tolist()))


def between_breaks(text: str) -> str:
    """What lies between the first place where something new begins and the last; empty if that is one place."""
    places = [place.end() for place in BREAK.finditer(text)]
    return text[places[0] : places[-1]].strip() if places else ""


def is_prose(text: str) -> bool:
    """Whether a text is words for the most part, not a table, markup or code."""
    flat = " ".join(text.split())
    letters = sum(character.isalpha() or character == " " for character in flat)
    return letters >= 0.9 * len(flat) and len(long_words(flat)) >= 8


def long_words(text: str) -> list[str]:
    """The words of five letters and more."""
    return re.findall(r"\b[A-Za-z]{5,}\b", text)


def topics(text: str) -> list[str]:
    """What the headings of a text name."""
    found = ["".join(parts[:1] + parts[2:]).strip() for parts in HEADINGS.findall(text)]
    return [topic for topic in found if re.fullmatch(r"\w[\w ,'/()-]*[\w)]", topic) and not topic.isupper()]
