"""Chats: conversations are what the template makes of them, made once, and a dataset beside the others."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from recipes.cli import app
from recipes.data.chats import Chats, NoChats, NoRightAnswer
from recipes.data.dialogue import OtherChats, chats_path, converse, make_chats
from recipes.data.requests import KINDS, Request, Requests
from recipes.data.rows import greedy_answers
from recipes.data.task import Task, UnsupportedModel
from recipes.teachers import Teacher
from tests.recipes.data import toy_corpora
from tests.recipes.data.test_recall import build_tokenizer
from tests.recipes.toys import llama

SMALL = {"conversations": 12, "answer_length": 5, "batch_size": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("chat")


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(vocab_size=len(tokenizer))


@pytest.fixture(autouse=True)
def cache(tmp_path, tokenizer, monkeypatch):
    toy_corpora.fill(tmp_path, tokenizer, monkeypatch)


@pytest.fixture
def made(model, tokenizer):
    return make_chats(model, tokenizer, **SMALL)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(tokenizer, texts, end=True):
    """Answers with those texts."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*answer, tokenizer.eos_token_id] if end else answer for answer in ids]


@pytest.mark.parametrize("cut", [False, True])
def test_a_conversation_is_what_the_template_makes_of_its_turns(tokenizer, cut):
    system = {"role": "system", "content": "Be brief."}
    requests = [
        Request("writing", (user("Hi."),), None),
        Request("writing", (system, user("What is a lamp?")), "And a kite?"),
    ]
    asked = []

    def answers(prompts, tell):
        asked.extend(prompts)
        tell(len(prompts))
        texts = ["A fox.", "An oven."] if len(prompts) == 2 else ["A kite."]
        return said(tokenizer, texts, end=not (cut and len(prompts) == 2))

    told = []
    documents = converse(tokenizer, requests, answers, lambda done, total: told.append((done, total)))
    turns = [
        [user("Hi."), {"role": "assistant", "content": "A fox."}],
        [
            system,
            user("What is a lamp?"),
            {"role": "assistant", "content": "An oven."},
            user("And a kite?"),
            {"role": "assistant", "content": "A kite."},
        ],
    ]
    whole = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in turns]
    if cut:
        whole[0] = whole[0].replace("fox.<eos>", "fox.")
    # The toy template begins an answer whether it is asked to or not.
    whole = [text.removesuffix("<bos>assistant: ") for text in whole]
    for prompt, rest, text in zip(documents[::2], documents[1::2], whole):
        assert tokenizer.decode(torch.cat([prompt, rest])) == text
    assert [ids.tolist() for ids in documents[::2]] == asked[:2]
    assert asked[2] == torch.cat([documents[2], documents[3]]).tolist()[: len(asked[2])]
    assert told == [(2, 3), (3, 3)]


def test_the_teacher_answers_every_request_once_or_twice(made, tokenizer):
    task = Chats(tokenizer)
    assert isinstance(task, Task)
    assert len(task.train) == 12
    asked = Requests(tokenizer, "train")
    turns = set()
    for number, item in enumerate(task.train):
        request, text = asked.make(number), tokenizer.decode(item["input_ids"])
        prompt = tokenizer.apply_chat_template(list(request.turns), tokenize=False)
        assert text.startswith(prompt)
        assert tokenizer.decode(item["input_ids"][: item["prompt"]]) == prompt
        later = text[len(prompt) :]
        assert (request.follow_up is None) == ("<bos>user: " not in later)
        assert request.follow_up is None or f"<bos>user: {request.follow_up}<eos><bos>assistant: " in later
        answers = item["input_ids"][item["prompt"] :]
        turns.add(len(answers) > 5)
    assert turns == {False, True}
    assert made.about["tokens"] == sum(task.train.sizes) == len(made.ids)
    assert made.ids.dtype == torch.uint16


def test_chats_are_made_once(made, tokenizer):
    again = make_chats(None, tokenizer, **SMALL)
    assert torch.equal(again.ids, made.ids)
    with pytest.raises(OtherChats, match=r"'temperature': 0\.2"):
        make_chats(None, tokenizer, temperature=0.2, **SMALL)


def test_chats_are_a_function_of_the_seed(made, model, tokenizer):
    chats_path(tokenizer, "smollm2-135m", 0).unlink()
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    again = make_chats(model, tokenizer, **SMALL)
    assert torch.equal(again.ids, made.ids)
    assert torch.equal(torch.rand(3), drawn)  # whoever else draws does not notice
    other = make_chats(model, tokenizer, seed=1, **SMALL)
    assert other.ids.tolist() != made.ids.tolist()


def test_each_request_has_the_answer_to_it(model, tokenizer):
    """Told by what the model says to one prompt at a time, where there is as good as nothing to draw."""
    make_chats(model, tokenizer, temperature=1e-4, **SMALL)
    task = Chats(tokenizer)
    for item in task.train:
        (alone,) = greedy_answers(model, task.prompts([item]), 5)
        assert torch.equal(item["input_ids"][item["prompt"] :][: len(alone)], alone)


def test_chats_are_those_of_a_teacher_a_template_and_a_seed(tokenizer):
    other = build_tokenizer("chat")
    other.chat_template = f" {other.chat_template}"
    paths = {
        chats_path(tokenizer, "a", 0),
        chats_path(tokenizer, "b", 0),
        chats_path(tokenizer, "a", 1),
        chats_path(other, "a", 0),
    }
    assert len(paths) == 4
    assert chats_path(build_tokenizer("chat"), "a", 0) in paths


def test_without_chats_it_says_how_to_make_them_and_still_can_judge(tokenizer):
    task = Chats(tokenizer, teacher="my-model", seed=3, test_size=5)
    assert len(list(task.test)) == 5
    with pytest.raises(NoChats, match="linmu data chats --teacher my-model --seed 3"):
        _ = task.train


def test_every_token_is_its_own_label_and_a_prompt_ends_before_the_first_answer(made, tokenizer):
    task = Chats(tokenizer)
    for item in task.train[:4]:
        assert torch.equal(task.collate([item])["labels"][0], item["input_ids"])
        assert task.prompts([item])["input_ids"].shape == (1, item["prompt"])
    assert task.train.sizes == [len(item["input_ids"]) for item in task.train]


def test_long_conversations_are_cut(made, tokenizer):
    whole, cut = Chats(tokenizer).train, Chats(tokenizer, length=50).train
    assert max(whole.sizes) > 50 == max(cut.sizes)
    for long, short in zip(whole, cut):
        assert torch.equal(short["input_ids"], long["input_ids"][:50])
        assert short["prompt"] <= len(short["input_ids"])


def test_two_models_are_compared_on_requests_about_held_out_corpora(model, tokenizer):
    from recipes.agreement import agreement, continuations

    task = Chats(tokenizer, test_size=30, max_new_tokens=4)
    found = agreement(model, continuations(model, task))
    assert found.agreement == 1.0
    assert set(found.groups) == {item["category"] for item in task.test} <= set(KINDS)
    assert all(tokenizer.decode(item["input_ids"]).endswith("<bos>assistant: ") for item in task.test)


def test_an_answer_has_no_score(tokenizer):
    with pytest.raises(NoRightAnswer, match="agreement"):
        Chats(tokenizer).score({}, torch.tensor([3]))


class Refusing:
    """Template → why it cannot chat."""

    NONE = None, "no chat template"
    NO_SYSTEM = "{{ raise_exception('no system role') }}", "no system role"
    USERS_ONLY = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "linmu",
    )


@pytest.mark.parametrize(("template", "why"), [Refusing.NONE, Refusing.NO_SYSTEM, Refusing.USERS_ONLY])
def test_a_tokenizer_that_cannot_lay_out_chats_is_refused(template, why):
    tokenizer = build_tokenizer("plain")
    tokenizer.chat_template = template
    for use in (Chats, lambda given: make_chats(None, given)):
        with pytest.raises(UnsupportedModel, match=why):
            use(tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tokenizer, monkeypatch):
    endless = build_tokenizer("chat")
    endless.eos_token = None
    with pytest.raises(UnsupportedModel, match="end token"):
        Chats(endless)


@pytest.mark.parametrize("options", [{"length": 0}, {"test_size": 0}, {"max_new_tokens": 0}])
def test_bad_sizes_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match="at least 1"):
        Chats(tokenizer, **options)


def test_the_command_makes_the_chats_that_the_dataset_reads(model, tokenizer, monkeypatch, tmp_path):
    specs = []

    def load(spec):
        specs.append(spec)
        return Teacher(model, tokenizer)

    monkeypatch.setattr("recipes.teachers.load_teacher", load)
    monkeypatch.setenv("COLUMNS", "200")
    command = ["data", "chats", "--teacher", "toy", "--conversations", "6", "--seed", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "chats.json")])
    assert result.exit_code == 0, result.output
    assert [(spec.model, spec.dtype) for spec in specs] == [("toy", "float32")]
    task = Chats(tokenizer, teacher="toy", seed=2)
    assert len(task.train) == 6
    assert str(sum(task.train.sizes)) in result.output.replace(",", "")
    assert str(tmp_path) in result.output
    other = CliRunner().invoke(app, [*command, "--temperature", "0.1"])
    assert other.exit_code == 2
    assert "delete" in other.output
