"""The parts joined: the decoder stays what it was, and what it cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from recipes.errors import TeacherError
from recipes.mini_vlm.build import VisionTokens, build_config, build_model, load_encoder
from recipes.mini_vlm.efficientnet import EfficientNetLite0
from recipes.tiny_vlm.build import build_tokenizer
from tests.recipes.mini_vlm.tiny import TINY_TOKENS

TEXT = {
    "vocab_size": 40,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "pad_token_id": 0,
}


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **fields})).eval()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_on_text_alone_the_model_is_the_decoder(tied):
    decoder = llama(tie_word_embeddings=tied)
    model = build_model(decoder, build_tokenizer(), TINY_TOKENS)
    ids = torch.randint(7, 40, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, decoder(ids).logits, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not model.training


def test_a_head_of_64_gives_time_the_share_that_the_qwen_models_give_it():
    config = build_config(llama().config, build_tokenizer(), TINY_TOKENS)
    assert config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
    assert config.text_config.rope_parameters["rope_theta"] == 1e5
    assert isinstance(config, AutoConfig.for_model("linmu_mini_vlm").__class__)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_what_qwens_decoder_has_not_is_refused(fields):
    with pytest.raises(
        TeacherError, match=next(iter(fields)) if "rope_parameters" not in fields else "rope_type"
    ):
        build_model(llama(**fields), build_tokenizer(), TINY_TOKENS)


def test_a_token_that_is_not_there_is_refused():
    with pytest.raises(TeacherError, match="<nothing>"):
        build_model(llama(), build_tokenizer(), VisionTokens(*TINY_TOKENS[:3], "<nothing>"))


def test_the_networks_weights_are_taken_over_but_for_the_classifier(model):
    weights = EfficientNetLite0().state_dict()
    for value in weights.values():
        value.copy_(torch.rand_like(value.float()).to(value.dtype))
    load_encoder(model, weights | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)})
    encoder = model.model.visual.encoder.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in weights.items())
    del weights["_bn0.bias"]
    with pytest.raises(RuntimeError, match=r"_bn0\.bias"):
        load_encoder(model, weights)
