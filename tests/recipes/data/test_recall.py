"""Recall as a task: the answer can be found, the length is met, the splits are apart, and answers are judged."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recipes.data import load_task
from recipes.data.problems import KINDS, PASSAGE, WORDS, TooFewWords
from recipes.data.recall import BadLength, BadWords, Recall, UnknownKind
from recipes.data.task import IGNORED, EmptyBatch, Task, UnsupportedModel
from recipes.errors import UnknownKeyError
from recipes.evaluate import evaluate
from recipes.plan import TaskSpec
from recipes.tiny_vlm.build import build_tokenizer as tiny_vlm_tokenizer
from tests.recipes.toys import llama

CHAT = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}<bos>assistant: "


def build_tokenizer(form: str = "plain") -> PreTrainedTokenizerFast:
    """Pieces of words over bytes; with a chat template, or with a token that begins every text, if wanted."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS.split())], trainer)
    if form == "begins":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT if form == "chat" else None,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def task(tokenizer):
    return Recall(tokenizer, lengths=[256, 1000], train_size=6, test_size=3)


def test_it_is_a_task_with_so_many_problems_of_each_kind_at_each_length(task):
    assert isinstance(task, Task)
    assert len(task.train) == 6 * 2 * 4
    assert len(list(task.test)) == len(task.test) == 3 * 2 * 4
    categories = [item["category"] for item in task.test]
    assert categories[:6] == ["copy 256"] * 3 + ["lookup 256"] * 3  # like lengths together: less padding
    assert {categories.count(f"{kind} {length}") for kind in KINDS for length in (256, 1000)} == {3}


@pytest.mark.parametrize("kind", ["copy", "lookup", "document"])
def test_the_text_goes_on_as_the_answer_does_and_in_one_place(task, kind):
    items = [item for item in (*task.train, *task.test) if item["kind"] == kind]
    for item in items:
        *text, example, _ = item["question"].split("\n\n")
        units = re.split(r"\n|(?<=\.) ", text[-1])
        found = [unit.removeprefix(item["lead"]) for unit in units if unit.startswith(f"{item['lead']} ")]
        assert [unit.removesuffix(".") for unit in found] == [f" {item['answer']}"]
        assert example.split("\n")[1] in [unit.removesuffix(".") for unit in units]
        assert not example.split("\n")[1].startswith(f"{item['lead']} ")
        assert len(item["answer"].split()) == (PASSAGE if kind == "copy" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_may_answer_many_questions_on_a_text(tokenizer, kind):
    """All of it within the length; the test asks as before."""
    lengths, every = [400, 1000], 100
    task = Recall(tokenizer, [kind], lengths, train_size=4, test_size=2, answer_every=every)
    plain = Recall(tokenizer, [kind], lengths, train_size=4, test_size=2)
    for item in task.train:
        parts = item["question"].split("\n\n")
        shown = [part.split("\n") for part in parts if len(part.split("\n")) == 2]
        assert len({question for question, _ in shown}) >= 0.8 * len(shown)  # a count may be asked for again
        assert len(shown) == item["length"] // every
        found = task.prompts([item])["input_ids"].shape[1]
        assert abs(found - item["length"]) <= 0.1 * item["length"]
    assert list(task.test) == list(plain.test)


def test_the_answer_may_stand_anywhere(tokenizer):
    task = Recall(tokenizer, ["lookup"], [1000], train_size=40)
    places = [item["question"].index(item["lead"]) / len(item["question"]) for item in task.train]
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_count_is_that_of_the_word_in_the_list(tokenizer):
    task = Recall(tokenizer, ["count"], [200, 400], train_size=40)
    for item in task.train:
        _, words, example, question = item["question"].split("\n\n")
        word = re.search(r"the word (\w+)", question).group(1)
        assert item["answer"] == str(words.split().count(word))
        shown, times = re.search(r"the word (\w+) occurs is (\d+)", example).groups()
        assert times == str(words.split().count(shown))
        assert shown != word
        assert f" {word} " in item["lead"]
    assert {item["answer"] for item in task.train} == set("123456789")


@pytest.mark.parametrize("form", ["plain", "chat", "begins"])
def test_prompts_have_the_length_asked_for(form):
    task = Recall(build_tokenizer(form), lengths=[256, 700, 3000], train_size=20, test_size=3)
    for item in [*task.train[:160], *task.test]:
        found = task.prompts([item])["input_ids"].shape[1]
        assert abs(found - item["length"]) <= 0.1 * item["length"], item["category"]


def test_the_splits_have_no_word_in_common(task):
    known = set(WORDS.split())

    def used(items):
        texts = " ".join(f"{item['question']} {item['lead']} {item['answer']}" for item in items)
        return known & set(re.findall(r"\w+", texts))

    train, test = used(task.train), used(task.test)
    assert len(train) > 200
    assert len(test) > 60
    assert not train & test
    assert not used(Recall(task.tokenizer, lengths=[256], seed=1, test_size=20).test) & train


def test_a_seed_gives_its_problems_again_in_any_order(task, tokenizer):
    again = Recall(tokenizer, lengths=[1000, 256], train_size=9, test_size=3)
    assert [again.test[i] for i in reversed(range(24))] == list(task.test)[::-1]
    assert again.train[:6] == task.train[:6]  # and the first ones of a larger split are the same
    assert len({item["question"] for item in task.train}) == len(task.train)
    other = Recall(tokenizer, lengths=[256, 1000], train_size=6, test_size=3, seed=1)
    assert not {item["question"] for item in other.test} & {item["question"] for item in task.test}


def test_test_problems_are_made_once_and_few_are_kept(task, tokenizer, monkeypatch):
    monkeypatch.setattr("recipes.data.recall.KEPT", 3)
    again = Recall(tokenizer, lengths=[256, 1000], train_size=6, test_size=3)
    items = list(again.test)
    assert [a is b for a, b in zip(items, again.test)] == [True] * 3 + [False] * 21
    assert list(again.test) == items == list(task.test)
    assert again.train[0] is not again.train[0]


@pytest.mark.parametrize("form", ["plain", "chat", "begins"])
def test_labels_are_the_answer_and_its_end(form):
    task = Recall(build_tokenizer(form), lengths=[256, 300], test_size=1)
    items = list(task.test)
    for item, row in zip(items, task.collate(items)["labels"]):
        labels = row[row != IGNORED]
        assert task.tokenizer.decode(labels) == f" {item['answer']}<eos>"
        assert len(labels) <= task.max_new_tokens


@pytest.mark.parametrize(
    ("form", "begin", "middle"),
    [
        ("plain", "Here are keys", "\n\n"),
        ("chat", "<bos>user: Here", "<bos>assistant: "),
        ("begins", "<bos>Here", ""),
    ],
)
def test_a_prompt_is_as_the_tokenizer_wants_it(form, begin, middle):
    task = Recall(build_tokenizer(form), ["lookup"], [256], test_size=1)
    text = task.tokenizer.decode(task.prompts(task.test[:])["input_ids"][0])
    assert text.startswith(begin)
    assert text.endswith(middle + task.test[0]["lead"])
    assert text.count("<bos>") == {"plain": 0, "chat": 2, "begins": 1}[form]


def test_the_true_answer_scores_one_and_that_of_another_problem_nothing(task):
    for kind in KINDS:
        items = [item for item in (*task.train, *task.test) if item["kind"] == kind]
        labels = task.collate(items)["labels"]
        for item, row in zip(items, labels):
            assert task.score(item, row[row != IGNORED]) == 1
        first = items[0]
        other = next(
            i for i, item in enumerate(items) if not {*item["answer"].split()} & {*first["answer"].split()}
        )
        assert task.score(first, labels[other][labels[other] != IGNORED]) == 0


@pytest.mark.parametrize(
    ("kind", "said", "score"),
    [
        ("lookup", " owl", 1),
        ("lookup", "\n  Owl.", 1),
        ("lookup", " owl<eos> cedar", 1),
        ("lookup", " owl. The key is cedar", 1),
        ("lookup", " owl\ncedar boat: fox", 1),
        ("lookup", " owl<pad><pad>", 1),
        ("lookup", " owl cedar", 0),
        ("lookup", " the owl", 0),
        ("lookup", " owls", 0),
        ("lookup", "", 0),
        ("copy", " owl fox boat", 0.75),
        ("copy", " owl fox cedar boat", 0.5),
        ("copy", " Owl, fox, boat, cedar!", 1),
        ("copy", " owl fox boat cedar owl fox boat cedar", 0.5),
        ("copy", "<eos> owl fox boat cedar", 0),
    ],
)
def test_only_the_answer_scores_and_a_copy_by_its_words(task, tokenizer, kind, said, score):
    item = {"kind": kind, "answer": "owl" if kind == "lookup" else "owl fox boat cedar"}
    ids = torch.tensor(tokenizer(said, add_special_tokens=False)["input_ids"], dtype=torch.long)
    assert task.score(item, ids) == score


def test_a_model_is_evaluated_by_kind_and_length(tokenizer):
    spec = TaskSpec(
        task="recall", options={"lengths": [256, 320], "test_size": 1, "kinds": ["lookup", "count"]}
    )
    task = load_task(spec, None, tokenizer)
    model = llama(vocab_size=len(tokenizer))
    assert evaluate(model, task).groups.keys() == {"lookup 256", "count 256", "lookup 320", "count 320"}
    assert torch.isfinite(model(**task.collate(task.train[:2])).loss)


def test_words_come_from_a_file(tokenizer, tmp_path):
    draw = Random(0)
    words = {"".join(draw.choices("abcdefgh", k=5)) for _ in range(80)}
    path = tmp_path / "words.txt"
    path.write_text("\n".join(sorted(words)).upper(), encoding="utf-8")
    task = Recall(tokenizer, ["copy", "lookup"], [400], words=path, train_size=2)
    assert all(set(item["answer"].split()) <= words for item in task.train)


@pytest.mark.parametrize(
    ("text", "found"),
    [("owl fox", "found 2"), ("owl it's 3d fox", "2 entries do not: 3d, it's"), ("", "found 0")],
)
def test_bad_word_lists_are_refused(tokenizer, tmp_path, text, found):
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadWords, match=found):
        Recall(tokenizer, words=path)


def test_lengths_that_cannot_be_met_are_refused(tokenizer, tmp_path):
    with pytest.raises(BadLength, match="of 20 tokens cannot be made for the kind 'lookup'"):
        Recall(tokenizer, ["lookup"], [20, 512])
    path = tmp_path / "words.txt"
    path.write_text(" ".join(WORDS.split()[:40]), encoding="utf-8")
    with pytest.raises(TooFewWords, match="7 words give only 42 pairs"):
        Recall(tokenizer, ["lookup"], [256, 2000], words=path)


@pytest.mark.parametrize(
    "options",
    [{"kinds": []}, {"lengths": []}, {"lengths": [0]}, {"train_size": 0}, {"test_size": 0}],
)
def test_bad_sizes_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match="needs a kind, a length"):
        Recall(tokenizer, **{"lengths": [256], **options})


def test_unknown_kinds_and_options_are_refused_with_near_names(tokenizer):
    with pytest.raises(UnknownKind, match="Did you mean 'lookup'"):
        Recall(tokenizer, ["look-up"])
    with pytest.raises(UnknownKeyError, match="Did you mean 'lengths'"):
        load_task(TaskSpec(task="recall", options={"length": [256]}), None, tokenizer)


def test_a_tokenizer_needs_an_end_token_and_no_padding_token():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    task = Recall(tokenizer, ["lookup", "count"], [256], test_size=1)
    batch = task.prompts(task.test[:])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedModel, match="eos_token"):
        Recall(tokenizer)


def test_a_tokenizer_that_loses_the_words_is_refused():
    with pytest.raises(UnsupportedModel, match="365 of 365 words"):
        Recall(tiny_vlm_tokenizer())


def test_a_batch_of_nothing_is_refused(task):
    for make in (task.collate, task.prompts):
        with pytest.raises(EmptyBatch, match="at least one"):
            make([])
