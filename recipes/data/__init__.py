"""Datasets: each is a `Task` (see `task`), made for one model's tokenizer and config."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mixers.errors import near
from recipes.data.task import Task
from recipes.errors import UnknownKeyError, UnknownTaskError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from recipes.plan import TaskSpec

TASKS = ("chats", "easy-vqa", "mix", "pictures", "recall", "text")


def load_task(spec: TaskSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Make a dataset for a model.

    Args:
        spec: ``recipe.data``, or one that a recipe is judged by.
        config: The model's config.
        tokenizer: The model's tokenizer.

    Raises:
        UnknownTaskError: No dataset has that name; near names are listed.
        UnknownKeyError: It has no such option; near names are listed.
        recipes.data.task.TaskError: The data is not installed or does not suit the model.
    """
    if spec.task not in TASKS:
        raise UnknownTaskError(
            f"no dataset is called {spec.task!r}.{near(spec.task, TASKS)} Known: {', '.join(TASKS)}; or pass "
            "your own Task object to distill()."
        )
    if spec.task == "chats":
        from recipes.data.chats import Chats

        _check_options(spec, Chats, "tokenizer")
        return Chats(tokenizer, **spec.options)
    if spec.task == "easy-vqa":
        from recipes.data.easyvqa import EasyVQA

        _check_options(spec, EasyVQA, "config", "tokenizer")
        return EasyVQA(config, tokenizer, **spec.options)
    if spec.task == "mix":
        from recipes.data.mix import Mix

        _check_options(spec, Mix, "config", "tokenizer")
        return Mix(config, tokenizer, **spec.options)
    if spec.task == "pictures":
        from recipes.data.pictures.task import Pictures

        _check_options(spec, Pictures, "config", "tokenizer")
        return Pictures(config, tokenizer, **spec.options)
    if spec.task == "recall":
        from recipes.data.recall import Recall

        _check_options(spec, Recall, "tokenizer")
        return Recall(tokenizer, **spec.options)
    from recipes.data.text import Text

    _check_options(spec, Text, "tokenizer")
    return Text(tokenizer, **spec.options)


def _check_options(spec: TaskSpec, task: Any, *given: str) -> None:
    options = [name for name in inspect.signature(task).parameters if name not in given]
    for name in spec.options:
        if name not in options:
            raise UnknownKeyError(
                f"the dataset {spec.task!r} has no option {name!r}.{near(name, options)} "
                f"Its options: {', '.join(options) or 'none'}."
            )
