"""What users ask is a function of seed, split and number, and quotes the corpora of its split, each in whole pieces."""

from __future__ import annotations

import re

import pytest

from recipes.data import requests
from recipes.data.corpora import CORPORA
from recipes.data.requests import (
    ABOUT_A_TEXT,
    KINDS,
    SIZES,
    SYSTEM,
    NoExcerpt,
    Requests,
    between_breaks,
    is_prose,
    topics,
)
from tests.recipes.data import toy_corpora
from tests.recipes.data.test_recall import build_tokenizer

NUMBERS = range(150)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("chat")


@pytest.fixture(autouse=True)
def cache(tmp_path, tokenizer, monkeypatch):
    toy_corpora.fill(tmp_path, tokenizer, monkeypatch)


def question(request) -> str:
    return request.turns[-1]["content"]


def test_a_request_is_a_function_of_seed_split_and_number(tokenizer):
    made = [Requests(tokenizer, "train").make(number) for number in NUMBERS]
    again = Requests(tokenizer, "train")
    assert [again.make(number) for number in reversed(NUMBERS)] == made[::-1]
    assert len(set(map(question, made))) > 140
    other = Requests(tokenizer, "train", seed=1)
    assert sum(other.make(number) == made[number] for number in NUMBERS) < 5


def test_all_kinds_come_with_and_without_system_prompt_and_second_turn(tokenizer):
    made = [Requests(tokenizer, "train").make(number) for number in NUMBERS]
    assert {request.kind for request in made} == set(KINDS)
    systems = {request.turns[0]["content"] for request in made if len(request.turns) == 2}
    assert systems == set(SYSTEM)
    assert 0 < sum(request.follow_up is not None for request in made) < len(made) / 2
    assert {tuple(turn["role"] for turn in request.turns) for request in made} == {
        ("user",),
        ("system", "user"),
    }
    assert not any(re.search(r"[{}]", f"{question(request)} {request.follow_up}") for request in made)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_quotes_whole_sentences_of_its_own_corpora(tokenizer, monkeypatch, split):
    monkeypatch.setattr(requests, "FRAMES", ("{ask} ## {text}",))
    texts = [
        document
        for name, documents in toy_corpora.texts().items()
        if CORPORA[name].held_out == (split == "test")
        for document in documents
    ]
    made = [Requests(tokenizer, split).make(number) for number in NUMBERS]
    excerpts = [question(request).partition(" ## ")[2] for request in made if request.kind in ABOUT_A_TEXT]
    assert len(excerpts) > 100
    for excerpt in excerpts:
        assert any(excerpt in text for text in texts)
        assert SIZES[0] <= len(tokenizer(excerpt)["input_ids"]) <= SIZES[1]
        assert re.match(r"[A-Z]|\w+ \(noun\): ", excerpt)
        assert re.search(r"(\.|\n\n[A-Z]\w+ \w+|: .+)\Z", excerpt)  # a sentence, a heading or a gloss


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_splits_share_no_text_and_no_topic(tokenizer, split, other):
    asked = " ".join(
        f"{question(request)} {request.follow_up}"
        for request in map(Requests(tokenizer, split).make, NUMBERS)
        if request.kind != "writing"
    )
    templates = " ".join((*(ask for asks in ABOUT_A_TEXT.values() for ask in asks), *requests.QUESTIONS))
    strange = set(toy_corpora.OF[other]) - set(re.findall(r"\w+", templates.lower()))
    assert not strange & set(re.findall(r"\w+", asked.lower()))


def test_nouns_to_write_about_are_apart_too(tokenizer):
    train, test = Requests(tokenizer, "train").nouns, Requests(tokenizer, "test").nouns
    assert not set(train) & set(test)
    assert len(train) > 2 * len(test) > 100


@pytest.mark.parametrize("kind", ["summary", "question"])
def test_corpora_of_nothing_but_code_are_an_error(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(requests, "TRIES", 5)
    monkeypatch.setattr(requests, "KINDS", (kind,))
    monkeypatch.setattr(toy_corpora, "document", lambda nouns, random: "0x0001 " * 200)
    toy_corpora.fill(tmp_path, tokenizer, monkeypatch)
    with pytest.raises(NoExcerpt, match="fortunes"):
        Requests(tokenizer, "test").make(0)


@pytest.mark.parametrize(
    ("text", "between"),
    [
        ("of one. Two three. Four", "Two three."),
        ('and "so." He left! (Then', "He left!"),
        ("end\n\nfirst part\n\nsecond", "first part"),
        ("ed\nfan (verb): to blow\nblunt (verb): less sharp\nwa", "fan (verb): to blow"),
        ("version 3. Then J. S. Bach, e.g. this", ""),
        ("nothing new", ""),
    ],
)
def test_an_excerpt_begins_and_ends_where_something_new_does(text, between):
    assert between_breaks(text) == between


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x\n\nMore on Lists\n=============\n\nHere", ["More on Lists"]),
        ("=head1 NAME\n\nx\n\n=head2 Core Changes\n\ny", ["Core Changes"]),
        ("flashback (noun): a thing\nhose, hose down (verb): to water", ["flashback", "hose"]),
        ('Arista \\A*ris"ta\\, n. [L.]\n   An awn.', ["Arista"]),
        ("bogo-sort\n /boh`goh·sort'/, n.\n\n    (var.)", ["bogo-sort"]),
        ("x.\n\n8.4. Binary Data Types\n\nThe type", ["Binary Data Types"]),
        ("x.\n\nOpening a Data Source\n\nTo open", ["Opening a Data Source"]),
        ("Only a sentence.\n\nAnother one here.\n\nAnd", []),
    ],
)
def test_topics_are_found_by_the_marks_of_each_corpus(text, found):
    assert topics(text) == found


def test_prose_is_words():
    words = "The second measure counts whether every sentence follows another without surprise"
    assert is_prose(words)
    assert is_prose(words.replace(" ", "\n     "))
    assert not is_prose("a b c")
    assert not is_prose(re.sub(" ", " | 0x01 ", words))
