"""The layout that reaches the mixers, and the law of causality through a whole model."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import bridges
import mixers
from mixers import TokenLayout
from tests.bridges import models
from tests.bridges.families.test_qwen2_5_vl import assert_same_clips, expected
from tests.bridges.models import END, IMAGE, START
from tests.helpers import assert_close

MMATE = {"*": {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2), "chunk_size": 8}}
ROWS: list[list[models.Segment]] = [models.MIXED_ROW, models.TWO_IMAGES_ROW]
TWO_EACH: list[models.Segment] = [
    START,
    ("image", (1, 4, 4)),
    END,
    START,
    ("video", (2, 4, 4)),
    END,
    7,
    START,
    ("video", (1, 4, 6)),
    END,
    START,
    ("image", (1, 6, 4)),
    END,
]


@pytest.fixture(scope="module")
def vlm() -> Any:
    return models.converted("qwen2_5_vl", MMATE)


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.converted("llama", MMATE)


def captured(model: Any, inputs: models.Inputs, **settings: Any) -> list[TokenLayout]:
    with models.layouts(model) as seen:
        models.logits(model, inputs, **settings)
    return seen


def positions(inputs: models.Inputs) -> Tensor:
    """Plain positions, where transformers would not work them out from such rows."""
    rows, length = inputs["input_ids"].shape
    return torch.arange(length).expand(3, rows, length)


class TestVision:
    """Qwen2.5-VL: which tokens are whose."""

    def test_a_forward_sees_every_clip(self, vlm: Any) -> None:
        rows = [*ROWS, TWO_EACH, [4, 5, 6]]
        inputs = models.vision_batch(*rows)
        (layout,) = captured(vlm, inputs)
        assert_same_clips(layout, expected(inputs, rows))
        assert torch.equal(layout.valid, inputs["attention_mask"].bool())
        (labelled,) = captured(vlm, {**inputs, "labels": models.labels(inputs)})
        assert torch.equal(labelled.clip, layout.clip)

    @pytest.mark.parametrize(
        "settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
    )
    def test_so_does_generate(self, vlm: Any, settings: dict[str, Any]) -> None:
        inputs = models.vision_batch(*ROWS)
        with models.layouts(vlm) as seen:
            models.generate(vlm, inputs, 3, **settings)
        first, *steps = seen
        copies = 2 if settings else 1
        wanted = expected(inputs, ROWS).select(torch.arange(2).repeat_interleave(copies))
        assert_same_clips(first, wanted)
        assert torch.equal(first.valid, inputs["attention_mask"].bool().repeat_interleave(copies, dim=0))
        assert all(step.length == 1 and step.clip is None for step in steps)

    def test_the_inner_models_see_it_too(self, vlm: Any) -> None:
        inputs = models.vision_batch(*ROWS)
        with torch.no_grad(), models.layouts(vlm) as seen:
            hidden = vlm.model(**inputs).last_hidden_state
        assert_same_clips(seen[0], expected(inputs, ROWS))
        with torch.no_grad():
            wanted = vlm(**inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(models.at_tokens(hidden, inputs), models.at_tokens(wanted, inputs))

    def test_adjacent_images_are_two_clips(self, vlm: Any) -> None:
        row: list[models.Segment] = [1, START, ("image", (1, 4, 4)), ("image", (1, 4, 6)), END, 3]
        inputs = models.vision_batch(row)
        (layout,) = captured(vlm, inputs, position_ids=positions(inputs))
        assert_same_clips(layout, expected(inputs, [row]))

    def test_nothing_stays_behind(self, vlm: Any) -> None:
        """Neither a prompt nor a refused forward shows in the next one."""
        text = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
        vision = models.vision_batch(*ROWS)
        embeddings = torch.randn(2, 27, 64)

        def outputs() -> list[Tensor]:
            with torch.no_grad():
                decoded = vlm.get_decoder()(inputs_embeds=embeddings).last_hidden_state
            return [decoded, models.logits(vlm, text)]

        wanted = outputs()
        models.generate(vlm, vision, 2)
        assert all(map(torch.equal, outputs(), wanted))
        for changed in ("image_grid_thw", "pixel_values"):
            broken = {**vision, changed: vision[changed][:-1]}
            for call in (models.logits, models.generate):
                with pytest.raises((ValueError, RuntimeError, IndexError)):
                    call(vlm, broken)
                assert all(map(torch.equal, outputs(), wanted))

    def test_a_layout_may_be_given(self, vlm: Any) -> None:
        inputs = models.vision_batch(*ROWS)
        layout = TokenLayout.from_mask(inputs["attention_mask"])
        (seen,) = captured(vlm, inputs, linmu_layout=layout)
        assert seen is layout

    @pytest.mark.parametrize("call", ["forward", "generate"])
    @pytest.mark.parametrize(
        "change",
        [
            {"image_grid_thw": None},
            {"image_grid_thw": torch.tensor([[1, 4, 6]])},
            {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4], [1, 8, 6], [1, 4, 4]])},
            {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 6], [1, 4, 4]])},
            {"video_grid_thw": torch.tensor([[0, 4, 6]])},
            {"video_grid_thw": torch.tensor([[2, 1, 6]])},
            {"video_grid_thw": torch.tensor([[2, 4, 5]])},
        ],
        ids=str,
    )
    def test_wrong_grids_are_refused_before_anything_is_computed(
        self, vlm: Any, call: str, change: dict[str, Any]
    ) -> None:
        inputs = {**models.vision_batch(*ROWS), **change}
        ran = []
        parts = [module for module in vlm.modules() if not list(module.children())]
        handles = [part.register_forward_hook(lambda *_: ran.append(True)) for part in parts]
        try:
            with pytest.raises(bridges.LayoutCaptureError):
                models.logits(vlm, inputs) if call == "forward" else models.generate(vlm, inputs)
        finally:
            for handle in handles:
                handle.remove()
        assert not ran

    def test_an_image_at_padding_is_refused(self, vlm: Any) -> None:
        inputs = models.vision_batch(*ROWS)
        inputs["attention_mask"][0, :4] = 0
        with pytest.raises(mixers.LayoutError, match="padding"):
            models.logits(vlm, inputs, position_ids=positions(inputs))


class TestLaw:
    """Output i depends on nothing at or after the end of the clip that covers i."""

    def outputs(self, model: Any, embeddings: Tensor, inputs: models.Inputs) -> Tensor:
        """Hidden states for embeddings given in the place of tokens and pixels."""
        known = {name: t for name, t in inputs.items() if "pixel" not in name}
        with torch.no_grad():
            return model.model(**known, inputs_embeds=embeddings).last_hidden_state

    @pytest.mark.parametrize("spec", ["mmate", "flex_ma", "swin3d", "bimamba2", "mamba2", "attention"])
    def test_it_holds_through_the_decoder(self, spec: str) -> None:
        model = models.converted("qwen2_5_vl", spec)
        inputs = models.vision_batch(TWO_EACH)
        layout = expected(inputs, [TWO_EACH])
        length = layout.length
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(1, length, 64, generator=generator)
        before = self.outputs(model, embeddings, inputs)
        for changed in range(length):
            other = embeddings.clone()
            other[:, changed] = torch.randn(64, generator=generator)
            moved = (self.outputs(model, other, inputs) != before).any(-1)[0]
            allowed = layout.end[0] > changed
            assert not (moved & ~allowed).any()
            if spec in ("mmate", "flex_ma", "bimamba2"):
                assert torch.equal(moved, allowed), f"token {changed} does not reach all that it may reach"
            if spec in ("mamba2", "attention"):
                assert not moved[:changed].any()

    def test_pixels_reach_their_own_clip_and_what_follows(self, vlm: Any) -> None:
        inputs = models.vision_batch(TWO_EACH)
        before = models.logits(vlm, inputs)
        for name, number, kind in (("pixel_values", 1, "image"), ("pixel_values_videos", 0, "video")):
            sizes = inputs[f"{kind}_grid_thw"].prod(1)
            changed = {**inputs, name: inputs[name].clone()}
            changed[name][int(sizes[: number + 1].sum()) - 1] += 1.0  # the last patch
            moved = (models.logits(vlm, changed) != before).any(-1)[0]
            (layout,) = captured(vlm, inputs)
            order = [c for c in dict.fromkeys(layout.clip[0].tolist()) if c >= 0]
            clip = order[3] if kind == "image" else order[1]
            first = int((layout.clip[0] == clip).nonzero()[0])
            assert not moved[:first].any()
            assert moved[first:].all()

    def test_what_stands_at_padding_never_matters(self, vlm: Any) -> None:
        for rows in (ROWS, [[4, 5, 6], models.IMAGE_ROW]):
            inputs = models.vision_batch(*rows)
            other = {**inputs, "input_ids": inputs["input_ids"].clone()}
            other["input_ids"][inputs["attention_mask"] == 0] = 77
            before, after = (models.at_tokens(models.logits(vlm, i), i) for i in (inputs, other))
            assert torch.equal(before, after)

    def test_nor_does_it_in_a_batch_of_one(self, llama: Any) -> None:
        inputs = models.text_batch(rows=1, pads=(6,))
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        other["input_ids"][:, :6] = 77
        before, after = (models.at_tokens(models.logits(llama, i), i) for i in (inputs, other))
        assert torch.equal(before, after)
        alone = models.logits(llama, {"input_ids": inputs["input_ids"][:, 6:]})
        assert_close("alone", alone[0], before, 1e-5)


class TestPadding:
    @pytest.mark.parametrize("family", models.FAMILIES)
    def test_right_padding_as_none_in_training(self, family: str) -> None:
        model = models.converted(family, MMATE).train()
        if family == "qwen2_5_vl":
            rows = [[*models.IMAGE_ROW], [1, 5, 6]]
            padded, alone = (
                models.vision_batch(*rows, side="right"),
                [models.vision_batch(row) for row in rows],
            )
        else:
            padded = models.text_batch(pads=(0, 7), side="right")
            alone = [{n: t[r : r + 1, : (20, 13)[r]] for n, t in padded.items()} for r in (0, 1)]
        gradients = []
        for batches in ([padded], alone):
            model.zero_grad()
            for inputs in batches:
                model(
                    **inputs, labels=models.labels(inputs), num_items_in_batch=torch.tensor(30)
                ).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        size = torch.stack([g.norm() for g in gradients[1].values()]).max()
        for name, wanted in gradients[1].items():
            assert (gradients[0][name] - wanted).norm() <= 1e-5 * size, name

    @pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
    def test_a_mask_of_ones_is_no_mask(self, family: str) -> None:
        model, inputs = models.converted(family, MMATE), models.batch(family, padded=False)
        without = {name: t for name, t in inputs.items() if name != "attention_mask"}
        assert torch.equal(models.logits(model, inputs), models.logits(model, without))

    def test_positional_arguments_are_read(self, llama: Any) -> None:
        inputs = models.text_batch()
        with torch.no_grad():
            found = llama(inputs["input_ids"], inputs["attention_mask"]).logits
        assert torch.equal(models.logits(llama, inputs), found)

    @pytest.mark.parametrize("spec", ["mmate", {"0": "mmate"}], ids=str)
    def test_a_mask_of_pairs_is_refused(self, spec: Any) -> None:
        """A mixer cannot follow it, and must not ignore it in silence."""
        inputs = models.text_batch()
        pairs = inputs["attention_mask"][:, None, None].bool() & torch.ones(20, 20).tril().bool()
        with pytest.raises(bridges.LayoutCaptureError, match=r"\[B, N\]"):
            models.logits(models.converted("llama", spec), {**inputs, "attention_mask": pairs})
        by_kind = {"full_attention": pairs}
        with pytest.raises(bridges.LayoutCaptureError, match="dict"):
            models.logits(models.converted("qwen2", spec), {**inputs, "attention_mask": by_kind})


LENGTHS = [9, 1, 7, 6]


def packings() -> dict[str, models.Inputs]:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None].int()},
        "cu_seq_lens": {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int()},
    }


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("spec", [MMATE, "attention", "mamba2"], ids=["mmate", "attention", "mamba2"])
@pytest.mark.parametrize(
    ("told_by", "padding"),
    [("position_ids", 0), ("seq_idx", 0), ("seq_idx", 3), ("cu_seq_lens", 0), ("cu_seq_lens", 3)],
)
def test_packed_rows_are_separate(family: str, spec: Any, told_by: str, padding: int) -> None:
    """Padding is at the end of the last sequence; beside its mask, position_ids say nothing of packing."""
    model = models.converted(family, spec)
    ids = models.text_batch(rows=1, length=sum(LENGTHS), pads=(0,))["input_ids"]
    told = packings()
    inputs = {"input_ids": ids, **told["position_ids"], **told[told_by]}
    if padding:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][:, -padding:] = 0
    packed = models.logits(model, inputs, use_cache=False)
    alone = torch.cat(
        [models.logits(model, {"input_ids": part}) for part in ids.split(LENGTHS, dim=1)], dim=1
    )
    count = sum(LENGTHS) - padding
    assert_close("logits", alone[:, :count], packed[:, :count], 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("spec", [MMATE, {"1": "mmate"}], ids=["all", "last"])
def test_gradient_checkpointing_changes_no_bit(family: str, spec: Any, reentrant: bool) -> None:
    model = models.converted(family, spec).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.enable_input_require_grads()
    gradients = []
    for one in (model, other):
        losses = []
        batches = [models.batch(family), models.batch(family, padded=False)]
        for inputs in batches:  # both forwards before a backward: a recomputation must see its own batch
            losses.append(one(**inputs, labels=models.labels(inputs)).loss)
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in one.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_threads_do_not_see_each_others_inputs(vlm: Any) -> None:
    """As under ``nn.DataParallel``: both threads have read their inputs before either reaches the decoder."""
    batches = [models.vision_batch(*rows) for rows in (ROWS, [TWO_EACH, models.IMAGE_ROW])]
    wanted = [models.logits(vlm, inputs) for inputs in batches]
    both = threading.Barrier(2, timeout=30)

    def meet(*_: Any) -> None:
        both.wait()

    handle = vlm.get_decoder().register_forward_pre_hook(meet, prepend=True)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda inputs: models.logits(vlm, inputs), batches))
    finally:
        handle.remove()
    for inputs, ours, theirs in zip(batches, found, wanted):
        assert torch.equal(models.at_tokens(ours, inputs), models.at_tokens(theirs, inputs))


def test_an_image_token_in_text_needs_its_image(vlm: Any) -> None:
    with pytest.raises(bridges.LayoutCaptureError, match="grids of the whole prompt"):
        models.logits(vlm, {"input_ids": torch.tensor([[5, IMAGE, 6]])})
