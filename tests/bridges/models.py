"""Tiny random teachers of each family and the batches they read; every weight matters, no network."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import bridges
from mixers import TokenLayout

PAD, IMAGE, VIDEO, START, END = 0, 120, 121, 122, 123
VOCABULARY = 128
MERGE, PATCH_WIDTH = 2, 3 * 2 * 4 * 4

TEACHERS = re.compile(r"[qkvo]_(proj|norm)\.")
"""Weights of a mixer that are the teacher's."""

Inputs = dict[str, Tensor]
Segment = int | tuple[str, tuple[int, int, int]]


def text_fields(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1 << 20,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return {**fields, **changes}


def llama(**changes: Any) -> LlamaForCausalLM:
    return ready(LlamaForCausalLM(LlamaConfig(**text_fields(attention_bias=True, **changes))))


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    return ready(Qwen2ForCausalLM(Qwen2Config(**text_fields(**changes))))


def qwen2_5_vl(**changes: Any) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_fields(rope_parameters=rope, **changes),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return ready(Qwen2_5_VLForConditionalGeneration(config))


SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
"""A window shorter than the rows that tests read, on the first layer."""


def mistral(**changes: Any) -> MistralForCausalLM:
    return ready(MistralForCausalLM(MistralConfig(**text_fields(**{"sliding_window": 7, **changes}))))


def qwen3(**changes: Any) -> Qwen3ForCausalLM:
    return ready(Qwen3ForCausalLM(Qwen3Config(**text_fields(**{"head_dim": 12, **changes}))))


def gemma2(**changes: Any) -> Gemma2ForCausalLM:
    bounded = {"head_dim": 12, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, **SLIDING}
    config = Gemma2Config(**text_fields(**{**bounded, **changes}))
    config._attn_implementation = "eager"  # others knew no soft-cap in older versions of transformers
    return ready(Gemma2ForCausalLM(config))


def gemma3(**changes: Any) -> Gemma3ForCausalLM:
    normed = {"head_dim": 12, "query_pre_attn_scalar": 20, **SLIDING}
    return ready(Gemma3ForCausalLM(Gemma3TextConfig(**text_fields(**{**normed, **changes}))))


def phi3(**changes: Any) -> Phi3ForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return ready(
        Phi3ForCausalLM(Phi3Config(**text_fields(rope_parameters=rope, sliding_window=9, **changes)))
    )


def granite(**changes: Any) -> GraniteForCausalLM:
    factors = {"attention_multiplier": 0.4, "residual_multiplier": 0.5}
    return ready(GraniteForCausalLM(GraniteConfig(**text_fields(**factors, **changes))))


def olmo2(**changes: Any) -> Olmo2ForCausalLM:
    return ready(Olmo2ForCausalLM(Olmo2Config(**text_fields(**changes))))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    fields = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "scale_attn_by_inverse_layer_idx": True,
        **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return ready(GPT2LMHeadModel(GPT2Config(**{**fields, **changes})))


def gpt_neox(**changes: Any) -> GPTNeoXForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    fields = text_fields(rope_parameters=rope, **changes)
    return ready(
        GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in fields.items() if "key_value" not in k}))
    )


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "granite": granite,
    "olmo2": olmo2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "qwen2_5_vl": qwen2_5_vl,
}


def ready(model: Any) -> Any:
    """Give the model weights of the size that training gives, biases included, and set it to evaluate."""
    shake(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter anew: matrices of unit gain, vectors about 1 or 0, whichever they were."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            embedding = "embed" in name and "patch" not in name
            parameter.copy_(noise if embedding else noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.3 * noise + parameter.mean().round())
    return module


@torch.no_grad()
def stir(module: nn.Module, seed: int = 1, size: float = 0.3) -> Any:
    """Move every new mixer parameter off its initial value, so that gates, taps and decays all take part."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if ".mixer." in name and not TEACHERS.search(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return module


@cache
def _teacher(family: str) -> PreTrainedModel:
    return FAMILIES[family]()


def teacher(family: str) -> Any:
    """Return a fresh copy of the family's tiny teacher."""
    return copy.deepcopy(_teacher(family))


def converted(
    model: Any, spec: Any = "mmate", *, seed: int = 3, stirred: bool = True, **settings: Any
) -> Any:
    """Return a converted copy of a teacher (or of the one of a family), whose new weights are not the initial ones."""
    student = teacher(model) if isinstance(model, str) else copy.deepcopy(model)
    torch.manual_seed(seed)
    bridges.replace_attention(student, spec, **settings)
    return stir(student) if stirred else student


def text_batch(rows: int = 2, length: int = 20, pads: Sequence[int] = (0, 5), side: str = "left") -> Inputs:
    """Draw text rows, each with its number of pads on one side."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 110, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads[:rows]):
        part = slice(0, count) if side == "left" else slice(length - count, length)
        ids[row, part], mask[row, part] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def vision_batch(*rows: Sequence[Segment], side: str = "left") -> Inputs:
    """Build a padded batch for Qwen2.5-VL from rows of token ids and ``("image" | "video", grid in patches)``.

    A row has the same pixels in every batch.
    """
    kinds = {"image": (IMAGE, 1), "video": (VIDEO, 2)}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    flat: list[list[int]] = []
    for row in rows:
        generator = torch.Generator().manual_seed(len(row))
        ids: list[int] = []
        for segment in row:
            if isinstance(segment, int):
                ids.append(segment)
                continue
            kind, (t, h, w) = segment
            ids += [kinds[kind][0]] * (t * (h // MERGE) * (w // MERGE))
            grids[kind].append((t, h, w))
            pixels[kind].append(torch.randn(t * h * w, PATCH_WIDTH, generator=generator))
        flat.append(ids)
    length = max(map(len, flat))
    ids_of = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids_of)
    for number, ids in enumerate(flat):
        part = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        ids_of[number, part], mask[number, part] = torch.tensor(ids), 1
    types = torch.zeros_like(ids_of)
    inputs: Inputs = {"input_ids": ids_of, "attention_mask": mask, "mm_token_type_ids": types}
    for kind, (token, number) in kinds.items():
        types[ids_of == token] = number
        if grids[kind]:
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
            inputs["pixel_values" if kind == "image" else "pixel_values_videos"] = torch.cat(pixels[kind])
    return inputs


IMAGE_ROW: list[Segment] = [1, START, ("image", (1, 4, 6)), END, 5, 6, 7, 8]
MIXED_ROW: list[Segment] = [
    1,
    START,
    ("image", (1, 4, 6)),
    END,
    5,
    START,
    ("video", (2, 4, 6)),
    END,
    9,
    10,
    11,
]
TWO_IMAGES_ROW: list[Segment] = [1, START, ("image", (1, 4, 4)), END, 3, START, ("image", (1, 8, 6)), END, 14]


def batch(family: str, *, padded: bool = True) -> Inputs:
    """Return a batch that the family's teacher reads; padded on the left if asked."""
    if family != "qwen2_5_vl":
        return text_batch(pads=(0, 5) if padded else (0, 0))
    return vision_batch(*((MIXED_ROW, TWO_IMAGES_ROW) if padded else (MIXED_ROW,)))


def row_of(family: str, row: int) -> Inputs:
    """Return one row of ``batch(family)`` alone, without its padding."""
    if family == "qwen2_5_vl":
        return vision_batch((MIXED_ROW, TWO_IMAGES_ROW)[row])
    both = batch(family)
    kept = both["attention_mask"][row].bool()
    return {name: table[row : row + 1, kept] for name, table in both.items()}


def generate(model: Any, inputs: Inputs, new_tokens: int = 6, **settings: Any) -> Any:
    """Generate greedily unless told otherwise, never the tokens that stand for vision."""
    settings = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO, START, END], **settings}
    return model.generate(**inputs, max_new_tokens=new_tokens, **settings)


@torch.no_grad()
def logits(model: Any, inputs: Inputs, **settings: Any) -> Tensor:
    return model(**inputs, **settings).logits


def labels(inputs: Inputs) -> Tensor:
    """Return labels of the tokens that a token, not padding, stands before."""
    mask = inputs["attention_mask"].bool()
    follows = mask & torch.cat([mask[:, :1], mask[:, :-1]], dim=1)
    return inputs["input_ids"].masked_fill(~follows, -100)


def generated(model: Any, inputs: Inputs, new_tokens: int = 6, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return new tokens [B, T] and the logits [T, B, V] that they were chosen from."""
    settings = {"return_dict_in_generate": True, "output_logits": True, **settings}
    out = generate(model, inputs, new_tokens, **settings)
    logits = torch.stack(out.logits)
    return out.sequences[:, -len(logits) :], logits


def at_tokens(table: Tensor, inputs: Inputs) -> Tensor:
    """Return what stands at tokens rather than padding."""
    return table[inputs["attention_mask"].bool()]


@contextlib.contextmanager
def layouts(model: Any) -> Iterator[list[TokenLayout]]:
    """Collect the layout that each forward hands to the first converted layer."""
    seen: list[TokenLayout] = []
    layer = next(a for a in bridges.attention_layers(model).values() if isinstance(a, bridges.MixerAttention))

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["linmu_layout"])

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
