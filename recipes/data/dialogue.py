"""Conversations of users with a teacher: laid out by its chat template, answered in batches, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipes.data.requests import REVISION, Request, Requests, corpora_of
from recipes.data.rows import answers_to
from recipes.data.task import TaskError, UnsupportedModel, pad
from recipes.data.tokens import Tokens, corpus_facts, made_once, path_of, read_tokens, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEACHER = "smollm2-135m"
"""Who answers unless another is named."""

TOP_K = 50
"""Of how many tokens the next one is drawn."""

ANSWER = "linmu-answer"
"""Stands for an answer, so that what the template puts behind it can be found."""


class OtherChats(TaskError, FileExistsError):
    """There are chats of that teacher and seed already, made in another way."""


def make_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: int = 6000,
    *,
    teacher: str = TEACHER,
    seed: int = 0,
    temperature: float = 0.7,
    answer_length: int = 256,
    batch_size: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Let a teacher answer the requests of the training split, and keep the conversations in the cache.

    Args:
        model: The teacher, on its device, in eval mode.
        tokenizer: Its tokenizer.
        conversations: How many.
        teacher: The teacher's name, by which the dataset finds them.
        seed: Of requests and answers.
        temperature: Of the sampling.
        answer_length: Tokens of an answer, at most.
        batch_size: Answers that are generated at once.
        progress: Told (done, total) answers after each batch.

    Returns:
        Two documents a conversation: what stands before the first answer, and the rest. They are those in the
        cache, if they were made with the same arguments before.

    Raises:
        UnsupportedModel: The tokenizer has no end token, or no chat template for such conversations.
        OtherChats: Those in the cache were made with other arguments.
        recipes.data.task.TaskError: The tokens of a training corpus cannot be had.
    """
    if min(conversations, answer_length, batch_size) < 1 or temperature <= 0:
        raise ValueError(
            "conversations, answer_length, batch_size and temperature must be positive; found "
            f"{conversations}, {answer_length}, {batch_size} and {temperature}"
        )
    check_template(tokenizer)
    settings = {
        "conversations": conversations,
        "seed": seed,
        "temperature": temperature,
        "top_k": TOP_K,
        "answer_length": answer_length,
    }
    path = chats_path(tokenizer, teacher, seed)

    def make() -> None:
        asked = Requests(tokenizer, "train", seed)
        requests = [asked.make(number) for number in range(conversations)]
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            answers = partial(_sampled, model, tokenizer, settings=settings, batch_size=batch_size)
            written = converse(tokenizer, requests, answers, progress)
        about = {"teacher": teacher, "settings": settings, "tokens": sum(map(len, written))}
        write_tokens(path, written, about, tokenizer)

    made_once(path, make)
    made = read_tokens("chats", path)
    if made.about["settings"] != settings:
        raise OtherChats(
            f"chats of {teacher} with seed {seed} are there, made with {made.about['settings']}; now wanted are "
            f"{settings}: delete {path}, or take another seed"
        )
    return made


def chats_path(tokenizer: PreTrainedTokenizerBase, teacher: str, seed: int) -> Path:
    """Where the chats of a teacher are cached."""
    corpora = [corpus_facts(one) for one in corpora_of("train")]
    return path_of("chats", tokenizer, tokenizer.chat_template, corpora, REVISION, teacher, seed)


def converse(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    answers: Callable[[Sequence[list[int]], Callable[[int], None]], list[list[int]]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Have requests answered, and then what is said to the answers.

    Args:
        tokenizer: Of whoever answers.
        requests: What is asked.
        answers: Prompts, and whom to tell how many are answered → an answer each, its end token included.
        progress: Told (done, total) answers.

    Returns:
        For each request two int32 [n]: what stands before the first answer, and the rest.
    """
    prompts = [prompt_ids(tokenizer, request) for request in requests]
    again = [i for i, request in enumerate(requests) if request.follow_up is not None]

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(prompts) + len(again))

    rests = answers(prompts, tell)
    for i in again:
        more = follow_up_ids(tokenizer, requests[i])
        # The end token is in the template, too; an answer that was cut has none of its own.
        rests[i] = rests[i] + (more[1:] if rests[i][-1] == more[0] else more)
    second = answers([prompts[i] + rests[i] for i in again], lambda done: tell(len(prompts) + done))
    for i, answer in zip(again, second):
        rests[i] = rests[i] + answer
    return [torch.tensor(ids, dtype=torch.int32) for both in zip(prompts, rests) for ids in both]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """What stands before the first answer."""
    return _ids(tokenizer, _rendered(tokenizer, request.turns))


def follow_up_ids(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """What stands between the first answer and the second."""
    said = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": str(request.follow_up)}]
    return _ids(tokenizer, _rendered(tokenizer, [*request.turns, *said]).rpartition(ANSWER)[2])


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a tokenizer can lay out conversations of two turns with a system prompt.

    Raises:
        UnsupportedModel: It has no end token, no chat template, or its template refuses or leaves out a turn.
    """
    if tokenizer.eos_token_id is None:
        raise UnsupportedModel("the tokenizer needs an end token: set eos_token")
    if tokenizer.chat_template is None:
        raise UnsupportedModel(
            "chats need a model that chats, and its tokenizer has no chat template: set chat_template, or leave "
            "the dataset out"
        )
    from jinja2 import TemplateError

    words = {"system": "linmu-system", "user": "linmu-user", "assistant": ANSWER}
    turns = [{"role": role, "content": word} for role, word in words.items()]
    try:
        text = _rendered(tokenizer, [*turns, {"role": "user", "content": "linmu-follow-up"}])
    except TemplateError as error:
        raise UnsupportedModel(
            f"the tokenizer's chat template refuses a system prompt with two turns: {error}"
        ) from error
    if lost := [word for word in (*words.values(), "linmu-follow-up") if text.count(word) != 1]:
        raise UnsupportedModel(
            f"the tokenizer's chat template does not show each turn of a conversation once: {', '.join(lost)} are "
            f"not in {text!r} as they should be"
        )


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    tell: Callable[[int], None],
    *,
    settings: Mapping[str, Any],
    batch_size: int,
) -> list[list[int]]:
    """What a model says to prompts, drawn at random, end token included.

    The longest prompts come first, so that too large a batch fails at once; like lengths need little padding.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = {"do_sample": True, "top_p": 1.0, "pad_token_id": pad_id}
    how |= {name: settings[name] for name in ("temperature", "top_k")}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    said: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        inputs = {
            "input_ids": pad([prompts[i] for i in chunk], pad_id, "left"),
            "attention_mask": pad([[1] * len(prompts[i]) for i in chunk], 0, "left"),
        }
        found = answers_to(model, inputs, settings["answer_length"], **how)
        said.update((i, ids.tolist()) for i, ids in zip(chunk, found))
        tell(len(said))
    return [said[i] for i in range(len(prompts))]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
