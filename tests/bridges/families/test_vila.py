"""VILA on a local stand-in: the module paths, the inputs and the order of tokens of its remote code."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

import bridges
from bridges.families.vila import watch_media
from tests.bridges import models, vlms
from tests.bridges.models import IMAGE, PAD, VIDEO
from tests.bridges.test_vlm_layouts import assert_layout_is_what_was_seen, seen_by
from tests.bridges.vlms import LINE_BREAK, PATCH, TILE, Segment
from tests.helpers import assert_close

MMATE = {"*": {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2), "chunk_size": 8}}


class VILAConfig(PreTrainedConfig):
    model_type = "vila"


class Tower(nn.Module):
    """Stands for SigLIP: a feature a patch, the mean colours and a mark of vision."""

    scales, resize_output_to_scale_idx = (TILE, 2 * TILE), -1

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(
            F.pad(F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2), (0, 1), value=1.0), (0, 60)
        )


class Projector(nn.Module):
    """Downsample two by two."""

    def forward(self, features: Tensor) -> Tensor:
        grid = features.transpose(1, 2).unflatten(2, (4, 4))
        return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Images, or videos whose frames are pooled in time; a line break after each."""

    start_tokens, sep_tokens = None, None

    def __init__(self, model: Any, end_tokens: str | None, pool_sizes: Any = None) -> None:
        super().__init__()
        self.parent, self.end_tokens = [model], end_tokens
        if pool_sizes is not None:
            self.pool_sizes = pool_sizes

    def forward(self, items: list[Tensor], config: dict[str, Any]) -> list[Tensor]:
        model, features = self.parent[0], []
        ends = [] if self.end_tokens is None else model.tokenizer(self.end_tokens).input_ids
        end = model.llm.get_input_embeddings()(torch.tensor(ends, dtype=torch.long))
        blocks = config.get("block_sizes") or [None] * len(items)
        for item, block in zip(items, blocks):
            frames = model.mm_projector(model.vision_tower(item if item.ndim == 4 else _tiles(item)))
            if item.ndim == 4:
                frames = (
                    frames.unflatten(0, (-1, self.pool_sizes[0][0])).mean(1)
                    if hasattr(self, "pool_sizes")
                    else frames
                )
            elif block is not None:
                frames = _joined(frames, *block)
            features.append(torch.cat([part for frame in frames for part in (frame, end)]))
        return features


def _tiles(image: Tensor) -> Tensor:
    """Cut [3, H, W] into tiles, which VILA stacks in the place of an image with blocks."""
    grid = image.unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return grid.permute(1, 2, 0, 3, 4).flatten(0, 1)


def _joined(tiles: Tensor, rows: int, columns: int) -> Tensor:
    side = int(tiles.shape[1] ** 0.5)
    grid = tiles.view(rows, columns, side, side, -1).transpose(1, 2)
    return grid.reshape(1, rows * side * columns * side, -1)


class Tokenizer:
    def __init__(self) -> None:
        self.media_token_ids = {"image": IMAGE, "video": VIDEO}

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[LINE_BREAK] * len(text))


class VILAForCausalLM(PreTrainedModel):
    """The shell: media are embedded in the place of their tokens, and the decoder gets embeddings alone."""

    config_class = VILAConfig

    def __init__(self, config: VILAConfig, llm: Any) -> None:
        super().__init__(config)
        self.llm, self.vision_tower, self.mm_projector = llm, Tower(), Projector()
        self.tokenizer, self.pad_token_list = Tokenizer(), (PAD, 2, "<|endoftext|>")
        self.encoders = {"image": Encoder(self, "\n"), "video": Encoder(self, "\n", [(2, 1, 1)])}

    def _embed(
        self,
        input_ids: Tensor,
        media: Any,
        media_config: Any,
        labels: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        embeds = {
            name: iter(self.encoders[name](items, media_config[name]))
            for name, items in (media or {}).items()
        }
        names = {token: name for name, token in self.tokenizer.media_token_ids.items()}
        labels = torch.full_like(input_ids, -100) if labels is None else labels
        rows, targets = [], []
        for row, ids in enumerate(input_ids):
            length = len(ids) if attention_mask is None else int(attention_mask[row].sum())
            parts, wanted = [], []
            for at, token in enumerate(ids[:length].tolist()):
                if token in names:
                    parts.append(next(embeds[names[token]]))
                else:
                    parts.append(self.llm.get_input_embeddings()(ids[at : at + 1]))
                wanted.append(
                    labels.new_full((len(parts[-1]),), -100 if token in names else int(labels[row, at]))
                )
            rows.append(torch.cat(parts))
            targets.append(torch.cat(wanted))
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), pad_sequence(targets, True, -100), mask

    def forward(
        self,
        input_ids: Tensor,
        media: Any = None,
        media_config: Any = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packing: bool = True,
        **kwargs: Any,
    ) -> Any:
        embeds, labels, mask = self._embed(input_ids, media, media_config, labels, attention_mask)
        if packing and self.training:
            embeds, mask = embeds[mask][None], mask[mask][None]
            labels = None
        return self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, **kwargs)

    def generate(
        self,
        input_ids: Tensor,
        media: Any = None,
        media_config: Any = None,
        attention_mask: Any = None,
        **settings: Any,
    ) -> Any:
        embeds, _, mask = self._embed(input_ids, media, media_config, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **settings)


ROWS: list[list[Segment]] = [
    [1, 5, ("image", None), 6, ("video", 4), 9, 10],
    [1, ("image", (2, 3)), 7, 8, ("image", (1, 1)), 3, 4, 5],
]


def batch(rows: list[list[Segment]], *, painted: bool = False) -> dict[str, Any]:
    """Build ids with one token an image or video, padded on the right, and the media."""
    paint = vlms.paint_place if painted else vlms.noise
    ids, media, blocks = [], {"image": [], "video": []}, []
    for row in rows:
        ids.append([])
        for number, segment in enumerate(row, start=1):
            if isinstance(segment, int):
                ids[-1].append(segment)
                continue
            kind, what = segment
            ids[-1].append(IMAGE if kind == "image" else VIDEO)
            if kind == "video":
                media[kind].append(torch.stack([paint(number, t // 2, TILE, TILE) for t in range(what)]))
            else:
                tall, wide = what or (1, 1)
                media[kind].append(paint(number, 0, tall * TILE, wide * TILE))
                blocks.append(what)
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [PAD] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in ids]),
        "media": {name: items for name, items in media.items() if items},
        "media_config": {"image": {"block_sizes": blocks}, "video": {}},
    }


def vila(spec: Any = MMATE) -> Any:
    llm = models.teacher("qwen2")
    bridges.replace_attention(llm, spec)
    model = VILAForCausalLM(VILAConfig(), models.stir(llm)).eval()
    watch_media(model)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return vila()


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE, VIDEO], **settings
    )


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [ROWS[0], [3, 4]], [[("image", None), ("video", 2), 5]]])
@pytest.mark.parametrize("beams", [0, 1, 3])
def test_the_decoder_is_told_where_media_stand(rows: list[list[Segment]], beams: int) -> None:
    model = vila("mamba2")
    nn.init.zeros_(model.llm.get_input_embeddings().weight)
    inputs = batch(rows, painted=True)

    def call() -> None:
        generate(model, inputs, num_beams=beams) if beams else model(**inputs)

    embeddings, layout = seen_by(model.llm, call)
    assert_layout_is_what_was_seen("vila", rows, embeddings, layout)


def test_greedy_is_what_one_pass_says(model: Any) -> None:
    out = generate(model, batch(ROWS[:1]), return_dict_in_generate=True, output_logits=True)
    longer = batch([[*ROWS[0], *out.sequences[0].tolist()]])
    with torch.no_grad():
        logits = model(**longer).logits
    assert_close("logits", logits[0, -6:-1], torch.stack(out.logits)[:, 0], 1e-5)


def test_a_row_as_alone_in_training(model: Any) -> None:
    inputs = batch(ROWS)
    student = copy.deepcopy(model).train()
    both = student(**inputs, packing=False).logits
    for row in range(2):
        alone = student(**batch(ROWS[row : row + 1]), packing=False).logits[0]
        assert_close("logits", alone, both[row, : len(alone)], 1e-5)
    both.sum().backward()
    assert all(p.grad is not None for p in student.llm.parameters())


def test_packing_is_refused_and_nothing_stays_behind(model: Any) -> None:
    inputs = batch(ROWS)
    wanted = generate(model, inputs)
    with pytest.raises(bridges.LayoutCaptureError, match="packing=False"):
        copy.deepcopy(model).train()(**inputs)
    assert torch.equal(generate(model, inputs), wanted)


def test_features_that_are_no_grid_are_refused(model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.mm_projector = nn.Sequential(Projector(), nn.Unflatten(1, (1, 4)), nn.Flatten(1, 2), _DropLast())
    with pytest.raises(bridges.LayoutCaptureError, match="no 1 frames of 1 × 1 squares"):
        broken(**batch([[1, ("image", None), 5]]))


class _DropLast(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features[:, :-1]


def test_the_shell_itself_is_refused_with_the_way_to_go() -> None:
    shell = VILAForCausalLM(VILAConfig(), models.teacher("qwen2"))
    with pytest.raises(bridges.UnknownFamilyError, match=r"convert model\.llm"):
        bridges.replace_attention(shell, "mmate")
    with pytest.raises(bridges.BridgeError, match=r"convert model\.llm"):
        watch_media(shell)
    with pytest.raises(bridges.BridgeError, match="has no llm"):
        watch_media(models.teacher("qwen2"))
