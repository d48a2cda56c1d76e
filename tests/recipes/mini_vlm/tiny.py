"""The mini VLM's classes with random weights: the network whole, a decoder of 2 layers of width 64."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.mini_vlm.build import VisionTokens, build_model
from recipes.mini_vlm.modeling import MiniVLMForConditionalGeneration
from recipes.tiny_vlm.build import IMAGE, VIDEO, VISION_END, VISION_START, build_tokenizer

TINY_TOKENS = VisionTokens(VISION_START, VISION_END, IMAGE, VIDEO)


def build_tiny() -> tuple[MiniVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return build_model(LlamaForCausalLM(config), tokenizer, TINY_TOKENS), tokenizer
