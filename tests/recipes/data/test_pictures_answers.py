"""Every answer of the `pictures` task is what its frames show, worked out anew from them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from recipes.data.pictures.frames import Chart, Line, Sprite
from recipes.data.pictures.question import COLORS
from tests.recipes.data.toy_pack import of, one_of_each_form, toy_task


@pytest.fixture(scope="module")
def task():
    return toy_task(lengths=[256, 512], test_lengths=[256, 1024], train_size=70, test_size=42)


@pytest.mark.parametrize("split", ["train", "test"])
def test_slideshows_answer_their_questions(task, split):
    pictures = task.pack.pictures
    for item in of(getattr(task, split), "slideshow"):
        names = [pictures[frame.things[0].picture].name for frame in item["frames"]]
        question, answer = item["question"], item["answer"]
        if match := re.fullmatch(r"What came right after the (.+)\?", question):
            places = [i for i, name in enumerate(names) if name == match[1]]
            assert [names[place + 1] for place in places] == [answer]
        elif match := re.fullmatch(r"What came (first|last)\?", question):
            assert names[{"first": 0, "last": -1}[match[1]]] == answer
        elif match := re.fullmatch(r"Was the (.+) shown\?", question):
            assert answer == ("yes" if match[1] in names else "no")
        else:
            both = re.fullmatch(r"Which came earlier: (.+) or (.+)\?", question).groups()
            assert [names.count(name) for name in both] == [1, 1]
            assert min(both, key=names.index) == answer


@pytest.mark.parametrize("split", ["train", "test"])
def test_needles_answer_their_questions(task, split):
    pictures = task.pack.pictures
    answers = set()
    for item in of(getattr(task, split), "needle"):
        shown = [frame.things[0] for frame in item["frames"]]
        colors = [thing.color for thing in shown if isinstance(thing, Line)]
        names = [pictures[thing.picture].name for thing in shown if isinstance(thing, Sprite)]
        answers.add(item["answer"])
        if match := re.fullmatch(r"How many times was the (.+) shown\?", item["question"]):
            assert names.count(match[1]) == int(item["answer"])
        elif match := re.match(r"In which corner was the (.+):", item["question"]):
            assert names.count(match[1]) == 1
            assert item["answer"] == corner(shown[names.index(match[1])])
        else:
            assert item["question"] == "What color was the word?"
            assert colors == [COLORS[item["answer"]]]
    assert answers >= {*"123456", "top left", "bottom right", *COLORS}


def corner(sprite):
    return f"{'top' if sprite.y < 0.5 else 'bottom'} {'left' if sprite.x < 0.5 else 'right'}"


def test_further_questions_are_answered_by_what_was_shown():
    task = toy_task("slideshow", "needle", lengths=[256, 512], train_size=60, further=9)
    seen = set()
    for item in task.train:
        slides = [frame.things[0] for frame in item["frames"]]
        names = [task.pack.pictures[s.picture].name if isinstance(s, Sprite) else None for s in slides]
        assert len(dict(item["further"])) == len(item["further"]) <= 9
        for question, answer in item["further"]:
            form, found = further_answer(question, names, slides)
            assert answer == found, question
            seen.add(form)
    assert seen == {"first", "last", "after", "next", "earlier", "shown", "count", "corner"}
    assert all(item["further"] == () for item in task.test)


def test_a_quarter_of_further_questions_ask_whether_something_was_shown_and_half_of_it_was_not():
    for item in toy_task("slideshow", "needle", lengths=[512], train_size=20, further=16).train:
        answers = [answer for question, answer in item["further"] if question.startswith("Was the ")]
        assert sorted(answers) == ["no", "no", "yes", "yes"]


def further_answer(question, names, slides):
    if match := re.fullmatch(r"List the (first|last) (\d+)\.", question):
        size = int(match[2])
        return match[1], ", ".join(names[:size] if match[1] == "first" else names[-size:])
    if match := re.fullmatch(r"List the (\d+) after the (.+)\.", question):
        assert names.count(match[2]) == 1
        start = names.index(match[2]) + 1
        return "after", ", ".join(names[start : start + int(match[1])])
    if match := re.fullmatch(r"What came right after the (.+)\?", question):
        assert names.count(match[1]) == 1
        return "next", names[names.index(match[1]) + 1]
    if match := re.fullmatch(r"Which came earlier: (.+) or (.+)\?", question):
        return "earlier", min(match.groups(), key=names.index)
    if match := re.fullmatch(r"Was the (.+) shown\?", question):
        return "shown", "yes" if match[1] in names else "no"
    if match := re.match(r"In which corner was the (.+):", question):
        assert names.count(match[1]) == 1
        return "corner", corner(slides[names.index(match[1])])
    return "count", str(names.count(re.fullmatch(r"How many times was the (.+) shown\?", question)[1]))


def test_further_questions_on_a_page_are_answered_by_it_and_ask_for_no_word_that_was_told():
    task = toy_task("reading", "shapes", train_size=240, further=2)
    seen, counts = set(), set()
    for item in task.train:
        if item["group"] != "reading":
            assert item["further"] == ()
            continue
        lines, told = item["frames"][0].things, {item["question"]}
        words = re.findall(r"\w+", f"{item['question']} {item['answer']}")
        counts.add(len(item["further"]))
        for question, answer in item["further"]:
            assert question not in told
            told.add(question)
            if match := re.fullmatch(r"What color is the word (.+)\?", question):
                assert COLORS[answer] == next(line.color for line in lines if line.text == match[1])
                seen.add("color")
            else:
                whole = "What number is this?" if answer.isdigit() else "What does it say?"
                parts = ["What does the upper line say?", "What does the lower line say?"]
                asks = parts if len(lines) > 1 else [whole]
                assert answer == lines[asks.index(question)].text
                assert answer not in words
                seen.add("line" if "line" in question else "page")
    assert seen == {"color", "line", "page"}
    assert counts == {1, 2}
    assert all(item["further"] == () for item in task.test)


def test_needles_and_their_answers_stand_anywhere():
    task = toy_task("slideshow", lengths=[1024], train_size=120)
    places = []
    for item in task.train:
        if item["form"] == "after":
            names = [task.pack.pictures[frame.things[0].picture].name for frame in item["frames"]]
            places.append(names.index(re.search("after the (.+)\\?", item["question"])[1]))
    assert min(places) < 16
    assert max(places) > 48


def test_clips_answer_their_questions(task):
    pictures = task.pack.pictures
    for item in of(task.train, "clips"):
        if item["form"] == "animation":
            steps = [frame.things[0] for frame in item["frames"]]
            assert [step.step for step in steps] == list(range(8))
            assert {task.pack.animations[step.animation].name for step in steps} == {item["answer"]}
            continue
        first, last = item["frames"][0].things, item["frames"][-1].things
        moved = {
            pictures[a.picture].name: (b.x - a.x, b.y - a.y, b.size - a.size, b.opacity - a.opacity)
            for a, b in zip(first, last)
        }
        (x, y, size, opacity), *_ = moved.values()
        found = {
            "direction": "left" if x < 0 else "right" if x > 0 else "up" if y < 0 else "down",
            "size": "larger" if size > 0 else "smaller",
            "fade": "appear" if opacity > 0 else "disappear",
            "turn": "left" if (item["frames"][1].things[0].turn - first[0].turn) % 360 < 180 else "right",
            "becomes": pictures[(first if "beginning" in item["question"] else last)[0].picture].name,
            "faster": max(moved, key=lambda name: abs(moved[name][0])),
            "mover": max(moved, key=lambda name: abs(moved[name][0])),
        }
        assert item["answer"] == found[item["form"]], item


def test_shapes_answer_their_questions(task):
    cards = task.pack.shapes
    for item in of(task.train, "shapes"):
        shown = [cards[frame.things[0].shape] for frame in item["frames"]]
        question, answer = item["question"], item["answer"]
        if match := re.search(r"How many (\w+)s are", question):
            assert sum(card.shape == match[1] for card in shown) == int(answer)
        elif match := re.search(r"What color is the (circle|rectangle|triangle)", question):
            assert [card.color for card in shown if card.shape == match[1]] == [answer]
        elif match := re.search(r"Is there a (.+)\?", question):
            assert answer == ("yes" if match[1] == f"{shown[0].color} {shown[0].shape}" else "no")
        elif "Where" in question:
            sides = {"left": shown[0].x < 0.5, "right": shown[0].x > 0.5, "top": shown[0].y < 0.5}
            assert sides.get(answer, shown[0].y > 0.5)
        else:
            card = shown[-1 if "last" in question else 0]
            assert answer == (card.color if "color" in question else card.shape)


def test_stills_answer_their_questions(task):
    pictures, capitals = task.pack.pictures, dict(task.pack.countries)
    for item in of(task.train, "names"):
        (thing,) = item["frames"][0].things
        if isinstance(thing, Chart):
            chart = task.pack.maps[thing.map]
            parts = {region.value: region.part for region in chart.regions}
            assert item["answer"] == (chart.country if item["form"] == "country" else parts[thing.region])
        else:
            picture = pictures[thing.picture]
            found = {"category": picture.category, "capital": capitals.get(picture.name)}
            assert item["answer"] == found.get(item["form"], picture.name)
    for item in of(task.train, "reading"):
        lines = item["frames"][0].things
        texts = [line.text for line in lines]
        question, answer = item["question"], item["answer"]
        if item["form"] in ("word", "number"):
            assert texts == [answer]
        elif item["form"] == "line":
            assert lines[0].y < lines[1].y
            assert answer == texts["lower" in question]
        elif item["form"] == "present":
            assert answer == ("yes" if f"say {texts[0]}?" in question else "no")


def test_a_picture_is_drawn_where_the_answer_says(task):
    for item in of(task.train, "needle"):
        if item["form"] != "corner":
            continue
        name = re.match(r"In which corner was the (.+):", item["question"])[1]
        frame = next(f for f in item["frames"] if task.pack.pictures[f.things[0].picture].name == name)
        pixels = np.asarray(task.canvas.draw(frame)).astype(int)
        y, x = np.argwhere(np.abs(pixels - frame.ground).sum(-1) > 30).mean(0)
        assert item["answer"] == f"{'top' if y < 64 else 'bottom'} {'left' if x < 64 else 'right'}"


def test_every_frame_shows_something(task):
    for item in one_of_each_form(task.train):
        frames = item["frames"] if item["form"] != "fade" else item["frames"][3:5]
        for frame in frames[:4]:
            assert np.asarray(task.canvas.draw(frame)).std() > 3, (item["category"], frame)
