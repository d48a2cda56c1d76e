"""Random models of a few thousand weights, a random dataset, and a recipe over them: all of it in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TrainerCallback,
)

from recipes.data.task import IGNORED, Batch, Item, pad
from recipes.plan import Recipe
from recipes.teachers import Teacher

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
IMAGE, VIDEO, START, END = 60, 61, 62, 63


def llama(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **config})).eval()


def qwen(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [0],
    }
    whole = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **config},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(whole).eval()


MODELS = {"llama": llama, "qwen": qwen}


class Tokenizer:
    """As much of a tokenizer as a run needs."""

    pad_token_id, eos_token_id = 0, 2

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class Riddles:
    """Random prompts of 3 to 9 ids, with an image of 2×2 tokens in front if wanted, and random answers of 2."""

    name, max_new_tokens = "riddles", 3

    def __init__(self, images: bool, items: int = 20) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = images
        lengths = torch.randint(3, 10, (items,), generator=generator).tolist()
        self.train = [
            {
                "prompt": torch.randint(3, 60, (length,), generator=generator).tolist(),
                "answer": [*torch.randint(3, 60, (2,), generator=generator).tolist(), 2],
                "pixels": torch.randn(16, 24, generator=generator),
            }
            for length in lengths
        ]
        self.test = self.train[:4]

    def _batch(self, items: Sequence[Item], answers: Sequence[list[int]], side: str) -> Batch:
        vision = [START, *[IMAGE] * 4, END] if self.images else []
        rows = [[*vision, *item["prompt"], *answer] for item, answer in zip(items, answers)]
        ids = pad(rows, 0, side)
        batch = {"input_ids": ids, "attention_mask": pad([[1] * len(row) for row in rows], 0, side)}
        if self.images:
            batch["mm_token_type_ids"] = (ids == IMAGE).long()
            batch["pixel_values"] = torch.cat([item["pixels"] for item in items])
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(items))
        return batch

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = self._batch(items, [item["answer"] for item in items], "right")
        lengths = batch["attention_mask"].sum(1).tolist()
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, length, item in zip(labels, lengths, items):
            row[length - 3 : length] = torch.tensor(item["answer"])
        return {**batch, "labels": labels}

    def prompts(self, items: Sequence[Item]) -> Batch:
        return self._batch(items, [[] for _ in items], "left")

    def score(self, item: Item, generated_ids: Tensor) -> float:
        return float(generated_ids.tolist() == item["answer"])


def teacher(kind: str = "llama") -> Teacher:
    return Teacher(MODELS[kind](), Tokenizer())


def batch(kind: str, rows: int = 3) -> Batch:
    task = Riddles(images=kind == "qwen")
    return task.collate(task.train[:rows])


def stage(**fields: Any) -> dict[str, Any]:
    """A stage that trains the mixers by token KD for two steps, unless said otherwise."""
    return {
        "name": "one",
        "trainable": ["mixers"],
        "losses": {"token_kd": 1.0},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0},
        "steps": 2,
        "batch_size": 2,
        "log_every": 1,
        **fields,
    }


def recipe(*stages: dict[str, Any], **fields: Any) -> Recipe:
    student = {"mixer": "mmate", "config": {"text_window": 4, "window": [1, 2, 2], "chunk_size": 8}}
    whole = {"name": "toy", "teacher": "toy", "student": student, "data": "riddles", "stages": list(stages)}
    return Recipe.from_dict({**whole, **fields})


def three_stages() -> list[dict[str, Any]]:
    """LinMU's stages, with every feature that a resumed run must get right."""
    return [
        stage(
            name="flex-ma",
            active=["flex_ma"],
            losses={"hidden_states": 1.0, "attention_weights": {"queries": 2}},
            steps=3,
            save_every=2,
        ),
        stage(
            name="local-swin",
            losses={"hidden_states": {"form": "injected"}, "token_kd": {"weight": 1.0, "tokens": "valid"}},
            gradient_accumulation=2,
            gradient_checkpointing=True,
            steps=4,
            save_every=2,
        ),
        stage(
            name="lora",
            lora={"targets": [r"layers\.\d+\.mlp\."], "rank": 2, "dropout": 0.2},
            losses={
                "hidden_states": {"form": "chained", "at": "layer"},
                "token_kd": 1.0,
                "sequence_kd": {"weight": 0.5, "samples": 6},
                "task": 0.5,
            },
            steps=4,
            save_every=3,
        ),
    ]


class Kill(TrainerCallback):
    """Stops a run as a signal would, in a stage after a step or after a checkpoint."""

    def __init__(self, stage: str, step: int, after_save: bool = False) -> None:
        self.where, self.after_save = (stage, step), after_save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.after_save and (args.run_name, state.global_step) == self.where:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_save and (args.run_name, state.global_step) == self.where:
            raise KeyboardInterrupt


QUIET = (TrainerCallback(),)
"""Callbacks that do nothing but keep the Trainer's progress bar away."""
