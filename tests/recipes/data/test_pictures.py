"""Pictures as a task: splits are apart, lengths are met, and every answer is what its frames show."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from recipes.data import load_task
from recipes.data.pictures.frames import Card, Chart, Frame, Line, Sprite, Step
from recipes.data.pictures.pack import BadPack, Pack
from recipes.data.pictures.task import GROUPS, LONG, STANDS_FOR, Pictures, UnknownGroup
from recipes.data.task import IGNORED, EmptyBatch, NoVisionTokens, Task, UnsupportedModel, VideoTooShort
from recipes.errors import UnknownKeyError
from recipes.evaluate import evaluate
from recipes.plan import TaskSpec
from tests.recipes.data.test_recall import build_tokenizer
from tests.recipes.data.toy_pack import of, one_of_each_form, toy_config, toy_pack, toy_task

LENGTHS, TEST_LENGTHS = [256, 512], [256, 1024]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def config():
    return toy_config()


@pytest.fixture(scope="module")
def task():
    return toy_task(lengths=LENGTHS, test_lengths=TEST_LENGTHS, train_size=70, test_size=42)


def things(items, kind):
    return [
        thing for item in items for frame in item["frames"] for thing in frame.things if type(thing) is kind
    ]


def asked(items, group):
    return [(item["question"], item["answer"], item["frames"]) for item in items if item["group"] == group]


def short(items):
    return [item for item in items if item["group"] not in LONG]


def test_a_share_gives_a_group_more_questions_and_changes_no_others(task):
    shared = toy_task(
        lengths=LENGTHS,
        test_lengths=TEST_LENGTHS,
        train_size=70,
        test_size=42,
        shares={"reading": 3, "needle": 2},
    )
    counts = Counter(item["category"] for item in shared.train)
    assert counts["reading"] == 210
    assert counts["needle 256"] == counts["needle 512"] == 140
    assert counts["names"] == counts["slideshow 512"] == 70
    assert len(shared.train.sizes) == len(shared.train)
    assert Counter(item["category"] for item in shared.test)["reading"] == 126
    for split, size in (("train", 70), ("test", 42)):
        before, now = (asked(getattr(t, split), "reading") for t in (task, shared))
        assert now[:size] == before
        assert len({str(question) for question in now}) > 2 * len(set(map(str, before)))
        assert asked(getattr(shared, split), "slideshow") == asked(getattr(task, split), "slideshow")
    assert shared.baselines.keys() == task.baselines.keys()
    assert shared.baselines["names"] == task.baselines["names"]
    assert shared.baselines["reading"] != task.baselines["reading"]


def test_it_is_a_task_with_so_many_questions_of_each_group_and_length(task):
    assert isinstance(task, Task)
    assert GROUPS.keys() == STANDS_FOR.keys()
    assert len(task.train) == 70 * (4 + 2 * 2)
    assert len(list(task.test)) == len(task.test) == 42 * (4 + 2 * 2)
    counts = Counter(item["category"] for item in task.test)
    assert counts.keys() == {
        *("names", "reading", "shapes", "clips"),
        *(f"{group} {length}" for group in LONG for length in TEST_LENGTHS),
    }
    assert set(counts.values()) == {42}
    assert {(item["group"], item["form"]) for item in task.test} == {
        (g, f) for g in GROUPS for f in GROUPS[g]
    }


def test_the_splits_show_no_picture_word_font_or_shape_in_common(task):
    """Of pictures that holds where they are to be recognised; long videos show trained ones, too."""
    for kind, field in (
        (Sprite, "picture"),
        (Step, "animation"),
        (Line, "text"),
        (Line, "font"),
        (Card, "shape"),
    ):
        splits = (task.train, short(task.test) if kind is Sprite else task.test)
        train, test = ({getattr(t, field) for t in things(s, kind)} for s in splits)
        if field == "text":
            train, test = ({text for text in texts if text.isalpha()} for texts in (train, test))
        assert train, field
        assert test, field
        assert not train & test, field


def test_maps_and_regions_are_held_out(task):
    for form, field in (("region", lambda c: c.map), ("country", lambda c: (c.map, c.region))):
        train, test = (
            {field(c) for c in things([i for i in s if i["form"] == form], Chart)}
            for s in (task.train, task.test)
        )
        assert train
        assert test
        assert not train & test


def test_a_seventh_of_the_names_is_never_seen_in_training_and_never_asked_for(task):
    pictures = task.pack.pictures
    train, test = (
        {pictures[s.picture].name for s in things(split, Sprite)} for split in (task.train, task.test)
    )
    everything = {picture.name for picture in pictures}
    new = everything - train
    assert len(new) == len(everything) // 7
    assert new <= test
    assert any(item["form"] == "which" and item["answer"] in new for item in task.test)
    asked = {item["answer"] for item in task.test if not item["choices"]}
    assert asked & everything
    assert not asked & new
    styles = {(pictures[s.picture].name, pictures[s.picture].style) for s in things(task.train, Sprite)}
    styles |= {task.pack.animations[s.animation][:2] for s in things(task.train, Step)}
    known = {(pictures[s.picture].name, pictures[s.picture].style) for s in things(short(task.test), Sprite)}
    known |= {task.pack.animations[s.animation][:2] for s in things(task.test, Step)}
    restyled = {name for name, _ in known} - new
    assert restyled
    assert all(any((name, style) in styles for style in ("round", "square")) for name in restyled)
    assert not styles & known
    long = [item for item in task.test if item["group"] in LONG]
    seen = {(pictures[s.picture].name, pictures[s.picture].style) for s in things(long, Sprite)}
    assert seen & styles
    assert seen & known


def test_captioned_items_show_what_their_answer_says(task):
    items = task.captioned(20)
    assert len(items) == 20
    assert len(task.captioned(10**6)) < task.train.size
    for item in items:
        (frame,), pack = item["frames"], task.pack
        (thing,) = frame.things
        shown = (
            pack.maps[thing.map].country if isinstance(thing, Chart) else pack.pictures[thing.picture].name
        )
        assert item["answer"] == shown
    assert not toy_task("reading").captioned(20)


def test_a_seed_gives_its_questions_again_in_any_order(task, config, tokenizer):
    again = Pictures(
        config,
        tokenizer,
        toy_pack(),
        lengths=LENGTHS[::-1],
        test_lengths=TEST_LENGTHS,
        train_size=90,
        test_size=42,
    )
    assert [again.test[i] for i in reversed(range(len(again.test)))] == list(task.test)[::-1]
    assert again.train[:70] == task.train[:70]  # and the first ones of a larger split are the same
    other = Pictures(
        config, tokenizer, toy_pack(), lengths=LENGTHS, test_lengths=TEST_LENGTHS, seed=1, test_size=42
    )
    same = sum(a == b for a, b in zip(other.test, task.test))
    assert same < len(task.test) / 10


@pytest.mark.parametrize("step", [4, 6, 7, 8])
def test_a_part_of_a_split_has_every_form(config, tokenizer, step):
    """As evaluation takes it: every k-th question."""
    task = Pictures(config, tokenizer, toy_pack(), lengths=[64], test_lengths=[64], test_size=840)
    counts = Counter((item["group"], item["form"]) for item in task.test)
    assert all(counts[group, form] == 840 // len(GROUPS[group]) for group in GROUPS for form in GROUPS[group])
    found = {(item["group"], item["form"]) for item in task.test[::step]}
    assert found == {(group, form) for group in GROUPS for form in GROUPS[group]}


def test_long_videos_have_the_tokens_asked_for(task, config):
    for item in one_of_each_form(task.test):
        batch = task.prompts([item])
        key = "video_token_id" if item["video"] else "image_token_id"
        tokens = int((batch["input_ids"] == getattr(config, key)).sum())
        assert tokens == 16 * len(item["frames"])
        if item["length"]:
            assert tokens == item["length"]
        assert item["video"] or len(item["frames"]) == 1
        assert (item["category"] in task.long_videos) == (item["length"] > 0)


def test_patches_are_those_of_the_image_processor(task):
    for item in one_of_each_form(task.test)[::5]:
        images = [task.canvas.draw(frame) for frame in item["frames"][:3]]
        expected = task.patcher.processor(images, return_tensors="pt")["pixel_values"]
        found = task.patcher.pixel_values(task.shown([item])[0].frames[:3])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_frame_is_drawn_once(task, monkeypatch):
    item = of(task.train, "slideshow")[0]
    first = task.collate([item])
    monkeypatch.setattr(task.canvas, "draw", lambda _: pytest.fail("the frame was drawn again"))
    again = task.collate([item])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_kept_frames_are_bounded(config, tokenizer):
    task = Pictures(config, tokenizer, toy_pack(), ["slideshow"], [1024], [1024], train_size=4)
    task.canvas._patches.most = 8
    task.collate(task.train[:4])
    assert len(task.canvas._patches) == 8


def test_labels_are_the_answer_and_its_end(task):
    items = one_of_each_form(task.test)[::3]
    for item, row in zip(items, task.collate(items)["labels"]):
        labels = row[row != IGNORED]
        assert task.tokenizer.decode(labels) == f" {item['answer']}<eos>"
        assert len(labels) <= task.max_new_tokens
        assert task.score(item, labels) == 1


def test_images_and_videos_share_a_batch_of_a_real_model(task, config):
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    items = [of(task.train, "names")[0], of(task.train, "clips")[0], of(task.train, "reading")[0]]
    batch = task.collate(items)
    assert {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"} <= batch.keys()
    with torch.no_grad():
        together = model(**batch).logits
        for i, item in enumerate(items):
            alone = task.collate([item])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(together[i, :length], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_a_model_is_evaluated_by_category(config, tokenizer):
    options = {"groups": ["clips", "needle"], "lengths": [64], "test_lengths": [64, 128], "test_size": 2}
    task = Pictures(config, tokenizer, toy_pack(), **options)
    found = evaluate(Qwen2VLForConditionalGeneration(config), task)
    assert found.groups.keys() == {"clips", "needle 64", "needle 128"} == task.baselines.keys()


def test_baselines_are_what_blind_answers_reach(config, tokenizer):
    """Counted anew: yes or no, one of two, one of four, and open answers."""
    task = Pictures(config, tokenizer, toy_pack(), ["clips", "slideshow"], [64], [64, 128], test_size=70)
    trained = [task.train[i] for i in range(400)]
    tested = of(task.test, "clips")
    usual = {
        form: Counter(item["answer"] for item in trained if item["form"] == form).most_common(1)[0][0]
        for form in GROUPS["clips"]
    }
    right = sum(item["answer"] == usual[item["form"]] for item in tested)
    assert task.baselines["clips"].most_frequent == pytest.approx(right / 70)
    forms = Counter(item["form"] for item in tested)
    guessed = forms["direction"] / 4 + sum(forms[form] for form in ("size", "turn", "fade", "faster")) / 2
    assert guessed / 70 <= task.baselines["clips"].question_alone < guessed / 70 + 0.2
    assert task.baselines["clips"].best < 0.7
    assert all(0.2 <= task.baselines[f"slideshow {length}"].best < 0.6 for length in (64, 128))


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (" owl", 1),
        ("Owl <eos>", 1),
        (" owl<eos> fox", 1),
        (" the owl", 0),
        (" owls", 0),
        ("", 0),
        ("<eos> owl", 0),
    ],
)
def test_only_the_answer_scores(task, tokenizer, said, score):
    ids = torch.tensor(tokenizer(said, add_special_tokens=False)["input_ids"], dtype=torch.long)
    assert task.score({"answer": "owl"}, ids) == score


def test_no_answer_needs_more_tokens_than_are_generated(task):
    longest = max(len(ids) for ids in task.answer_ids([item["answer"] for item in (*task.train, *task.test)]))
    assert longest < task.max_new_tokens <= longest + 8


def test_one_file_is_all_it_needs(task, config, tokenizer, tmp_path):
    path = tmp_path / "pack.zip"
    toy_pack().save(path)
    assert Pack.load(path) == toy_pack()
    assert list(tmp_path.iterdir()) == [path]
    spec = TaskSpec(
        task="pictures", options={"pack": str(path), "test_lengths": [256, 1024], "test_size": 42}
    )
    again = load_task(spec, config, tokenizer)
    items = task.test[::29]
    assert again.test[::29] == items
    ours, theirs = task.collate(items), again.collate(items)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("content", [b"", b"no zip at all", None])
def test_other_files_are_no_pack(tmp_path, content):
    path = tmp_path / "pack.zip"
    if content is None:
        pack = Pack(words=["owl"])
        pack.save(path)
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.write_bytes(content)
    with pytest.raises(BadPack, match="make it anew"):
        Pack.load(path)


def test_a_pack_with_too_little_is_refused(config, tokenizer):
    with pytest.raises(BadPack, match="the train split needs at least 4 known, but the pack gives it 0"):
        Pictures(config, tokenizer, Pack())


def test_unknown_groups_and_options_are_refused_with_near_names(config, tokenizer):
    for options in ({"groups": ["slideshows"]}, {"shares": {"slideshows": 2}}):
        with pytest.raises(UnknownGroup, match="Did you mean 'slideshow'"):
            Pictures(config, tokenizer, toy_pack(), **options)
    with pytest.raises(UnknownKeyError, match="Did you mean 'lengths'"):
        load_task(TaskSpec(task="pictures", options={"length": [256]}), config, tokenizer)


@pytest.mark.parametrize(
    "options",
    [{"groups": []}, {"lengths": []}, {"train_size": 0}, {"test_size": 0}, {"shares": {"names": 0}}],
)
def test_bad_sizes_are_refused(config, tokenizer, options):
    with pytest.raises(ValueError, match="needs a group, lengths"):
        Pictures(config, tokenizer, toy_pack(), **options)


def test_what_cannot_be_shown_is_refused(task, config, tokenizer):
    with pytest.raises(VideoTooShort, match="at least 48"):
        Pictures(config, tokenizer, toy_pack(), lengths=[32])
    with pytest.raises(NoVisionTokens, match="32×32"):
        Pictures(config, tokenizer, toy_pack(), side=16)
    with pytest.raises(UnsupportedModel, match="pictures shows images"):
        Pictures(config.get_text_config(), tokenizer, toy_pack())
    for make in (task.collate, task.prompts):
        with pytest.raises(EmptyBatch, match="at least one"):
            make([])


def test_a_frame_of_nothing_is_its_ground(task):
    image = task.canvas.draw(Frame((), (10, 20, 30)))
    assert image.size == (128, 128)
    assert image.getcolors() == [(128 * 128, (10, 20, 30))]
