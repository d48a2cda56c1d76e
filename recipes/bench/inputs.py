"""Real or random inputs of any length, for benchmarks of whole models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.data.easyvqa import EasyVQA
from recipes.data.task import Batch

Inputs = Callable[[int], Batch]
"""From a number of tokens to forward's arguments for one row of about so many."""


def inputs_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Return the builder that fits a model: easy-VQA slideshows for one that sees, random text for others."""
    if getattr(model.config, "vision_config", None) is not None:
        return EasyVQA(model.config, tokenizer).slideshow
    return random_text(model.config.get_text_config().vocab_size)


def random_text(vocabulary: int) -> Inputs:
    """Return a builder of token ids drawn evenly from the vocabulary, the same ones each time."""

    def build(tokens: int) -> Batch:
        ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build
