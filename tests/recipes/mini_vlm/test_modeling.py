"""The mini VLM as a model of transformers and of bridges: positions, generation, conversion, saving."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLModel

import bridges
from recipes.mini_vlm.modeling import MiniVLMConfig, MiniVLMForConditionalGeneration
from recipes.mini_vlm.tower import GridError
from recipes.shared_vision import SharedVision
from tests.recipes.mini_vlm.inputs import ROWS, batch

MMATE = {"text_window": 4, "window": [2, 1, 2], "chunk_size": 8}
NEW = 6


def relative(ours, theirs, mask):
    ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    return float((ours - theirs).norm() / theirs.norm())


def positions(model, inputs):
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: inputs[name] for name in wanted if name in inputs})


def continued(model, inputs):
    """The ids generated with a cache, and the logits of the whole row in one pass, step by step."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    longer = {
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], dim=1),
    }
    with torch.no_grad():
        logits = model(**{**inputs, **longer}, use_cache=False).logits
    return torch.stack(out.logits, dim=1), logits[:, -NEW - 1 : -1]


class TestPositions:
    def test_images_stand_as_in_qwen2_vl(self, model):
        inputs = batch(model.config, [ROWS[2], [("image", (1, 6, 2)), 1, ("image", (1, 4, 4)), 3]])
        theirs = Qwen2VLModel.get_rope_index(
            model.model,
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        for ours, expected in zip(positions(model, inputs), theirs):
            assert torch.equal(ours, expected)

    def test_text_after_a_video_stands_after_its_last_frame(self, model):
        inputs = batch(model.config, [[1, ("video", (9, 2, 4)), 2]])
        (where,), delta = positions(model, inputs)[0].unbind(1), positions(model, inputs)[1]
        video = inputs["mm_token_type_ids"][0] == 2
        assert where[:, video].T.tolist() == [[2 + t, 2, 2 + w] for t in range(9) for w in range(2)]
        assert where[:, -3:].tolist() == [[11, 12, 13]] * 3
        assert delta.item() == 14 - inputs["input_ids"].shape[1]

    def test_padding_moves_nothing(self, model):
        ours = [batch(model.config, side=side) for side in ("left", "right")]
        (left, _), (right, _) = (positions(model, inputs) for inputs in ours)
        for row in range(len(ROWS)):
            left_row, right_row = (
                where[:, row, inputs["attention_mask"][row].bool()]
                for where, inputs in zip((left, right), ours)
            )
            assert torch.equal(left_row, right_row)

    def test_a_missing_grid_is_told(self, model):
        inputs = batch(model.config)
        with pytest.raises(GridError, match="a grid for each image and video"):
            positions(model, {**inputs, "video_grid_thw": inputs["video_grid_thw"][:1]})


class TestGeneration:
    def test_a_question_after_a_long_video_may_come_later(self, model):
        """Longer in time than in space, which is where transformers' own positions part."""
        inputs = batch(model.config, [[2, ("video", (20, 2, 2)), 3]])
        prompt = {name: inputs[name][:, :-3] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        with torch.no_grad():
            whole = model(**inputs).logits[:, -3:]
            cache = model(**{**inputs, **prompt}, use_cache=True).past_key_values
            steps = model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache).logits
        torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-4)

    def test_left_padding_changes_no_answer(self, model):
        together, _ = continued(model, batch(model.config))
        rows = ROWS[1:2]
        alone = batch(model.config, rows)
        both = batch(model.config)
        alone["input_ids"] = both["input_ids"][1:2][both["attention_mask"][1:2].bool()][None]
        frames = both["video_grid_thw"].prod(1).tolist()
        alone["pixel_values_videos"] = both["pixel_values_videos"].split(frames)[1]
        torch.testing.assert_close(continued(model, alone)[0], together[1:2], atol=1e-4, rtol=1e-4)


class TestBridges:
    def test_the_identity_bridge_gives_the_teachers_logits_back(self, model):
        inputs = batch(model.config)
        student = copy.deepcopy(model)
        bridges.replace_attention(student, "attention")
        with torch.no_grad():
            ours, theirs = student(**inputs).logits, model(**inputs).logits
        assert relative(ours, theirs, inputs["attention_mask"]) <= 1e-5
        for part in zip(continued(student, inputs), continued(model, inputs)):
            torch.testing.assert_close(*part, atol=1e-4, rtol=1e-4)

    def test_mmate_knows_where_vision_stands(self, model):
        """A change in the first frame reaches it, and a change in a clip's end reaches the clip's start."""
        bridges.replace_attention(model, "mmate", **MMATE)
        inputs = batch(model.config, ROWS[1:2])
        video = (inputs["mm_token_type_ids"][0] == 2).nonzero().flatten()
        changed = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
        changed["pixel_values_videos"][-8:] *= -1  # the last frame
        with torch.no_grad():
            before, after = model(**inputs).logits[0], model(**changed).logits[0]
        assert torch.equal(before[: video[0]], after[: video[0]])
        assert (before[video[0]] != after[video[0]]).any()

    def test_teacher_and_student_look_once(self, model):
        student = copy.deepcopy(model).requires_grad_(False)
        bridges.replace_attention(student, "mmate", **MMATE)
        assert SharedVision(model, student).shared

    def test_mmate_generates_as_in_one_pass(self, model):
        bridges.replace_attention(model, "mmate", **MMATE)
        cached, whole = continued(model, batch(model.config))
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("converted", [False, True])
    def test_a_saved_model_is_loaded_as_it_was(self, model, tmp_path, converted):
        if converted:
            bridges.replace_attention(model, "mmate", **MMATE)
        model.save_pretrained(tmp_path)
        loaded, told = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told.values())
        assert isinstance(loaded, MiniVLMForConditionalGeneration)
        inputs = batch(model.config)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)

    def test_bridges_loads_a_student_of_a_class_that_is_not_transformers_own(self, model, tmp_path):
        bridges.replace_attention(model, "mmate", **MMATE)
        model.save_pretrained(tmp_path)
        loaded = bridges.load_pretrained(tmp_path)
        assert isinstance(loaded, MiniVLMForConditionalGeneration)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_config_keeps_its_parts(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MiniVLMConfig
    assert type(config.vision_config) is type(model.config.vision_config)
    assert config.vision_config.patch_size == 16
    assert config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
