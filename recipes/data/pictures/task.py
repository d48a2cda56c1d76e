"""The `pictures` task: real pictures and videos of them, in six groups of questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from mixers.errors import near
from recipes.data.pictures.films import CLIPS, SHAPES
from recipes.data.pictures.frames import Canvas, Frame
from recipes.data.pictures.pack import Pack, load_pack
from recipes.data.pictures.question import COLORS, Group
from recipes.data.pictures.shelf import Shelf, shelf
from recipes.data.pictures.slideshows import NEEDLE, SLIDESHOW, further
from recipes.data.pictures.stills import CORNERS, NAMES, READING, further_reading
from recipes.data.task import DatasetNotInstalled, Item, MadeItems, TaskError, VideoTooShort
from recipes.data.visual import Shown, VisualTask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GROUPS: Mapping[str, Group] = MappingProxyType(
    {
        "names": NAMES,
        "reading": READING,
        "shapes": SHAPES,
        "clips": CLIPS,
        "slideshow": SLIDESHOW,
        "needle": NEEDLE,
    }
)
LONG = ("slideshow", "needle")
"""The groups that have lengths."""

STANDS_FOR = MappingProxyType(
    {
        "names": "MMMU",
        "reading": "TextVQA",
        "shapes": "Video-MME",
        "clips": "ActivityNet-QA",
        "slideshow": "LongVideoBench",
        "needle": "MLVU",
    }
)
"""The benchmark of the LinMU paper in whose place a group stands."""

CAPTIONED = ("name", "flag", "country")
"""Forms of `names` whose answer is what the image shows."""

MEASURED = 24
"""Training questions of a kind that tell how long all of it are."""

SAMPLE = 400
"""Training questions of a category that trivial answers are learnt from."""


class UnknownGroup(TaskError, ValueError):
    """No group of questions has that name."""


class Baseline(NamedTuple):
    """How many test questions of a category are answered rightly without a look.

    Attributes:
        most_frequent: By the answer that is most frequent in training for the question's form.
        question_alone: By what the text of the question tells: the most frequent training answer to the very
            question, or a guess among the answers it leaves open, whichever is better for its form.
    """

    most_frequent: float
    question_alone: float

    @property
    def best(self) -> float:
        """The better of the two."""
        return max(self)


class Questions(MadeItems):
    """One split: `size` questions of each group, of the long ones at each length, each made when asked for.

    A group that has a share of more than 1 comes so many times, with other questions each time.
    """

    def __init__(
        self,
        task: Pictures,
        shelf: Shelf,
        split: str,
        lengths: Sequence[int],
        size: int,
        shares: Mapping[str, int],
    ) -> None:
        self.task, self.shelf, self.split, self.size = task, shelf, split, size
        groups = [group for group in task.groups for _ in range(shares.get(group, 1))]
        kinds = [(group, 0) for group in groups if group not in LONG]
        longs = [group for group in groups if group in LONG]
        self.kinds = kinds + [(group, length) for length, group in product(lengths, longs)]

    def __len__(self) -> int:
        return len(self.kinds) * self.size

    @cached_property
    def sizes(self) -> list[int]:
        """About how many tokens each question has: the most among the first few of its kind."""
        starts = range(0, len(self), self.size)
        longest = [
            max(map(self.task.size, self[start : start + min(self.size, MEASURED)])) for start in starts
        ]
        return [most for most in longest for _ in range(self.size)]

    def item(self, place: int) -> Item:
        """The question at a place of the split."""
        kind, number = divmod(place, self.size)
        before = self.kinds[:kind].count(self.kinds[kind])
        return self.make(*self.kinds[kind], before * self.size + number)

    def make(self, group: str, length: int, number: int) -> Item:
        """The question with that number of a group, `length` vision tokens long if the group has lengths."""
        key, forms = f"{self.task.seed} {self.split} {group} {length}", GROUPS[group]
        turn, place = divmod(number, len(forms))
        form = Random(f"{key} turn {turn}").sample(list(forms), len(forms))[place]
        question = forms[form](self.shelf, Random(f"{key} {number}"), length // self.task.frame_tokens)
        if (count := self.task.further) and self.split == "train":
            draw = Random(f"{key} {number} further")
            if length:
                question = question._replace(further=further(self.shelf, draw, question.frames, count))
            elif group == "reading":
                question = question._replace(further=further_reading(draw, question, count))
        category = _category(group, length)
        return {"group": group, "category": category, "form": form, "length": length, **question._asdict()}


class Pictures(VisualTask):
    """Questions on real pictures and on videos of them, for a small model of the Qwen-VL kind, as a `Task`.

    The groups: `names` (what emoji, flags and maps show), `reading` (words in many fonts), `shapes` (easy-VQA images,
    one or several), `clips` (pictures that move), `slideshow` (what came when) and `needle` (counting and finding),
    the last two at lengths of thousands of vision tokens. Each stands for a benchmark of the LinMU paper (see
    `STANDS_FOR`). Their questions come in several forms, each as often as the others, with
    short answers of one to four words.

    The test split asks about names in a style that training does not show them in, about names, words, fonts and
    maps that training does not show at all, and at lengths of its own.

    Items are `{"group", "category", "form", "length", "question", "answer", "frames", "choices", "video", "further"}`:
    frames as data, drawn when a batch is made. They are a function of the options, not of the order of access.

    Args:
        config: The model's config: it says how images become patches and which ids mark vision.
        tokenizer: The model's tokenizer; its end-of-text token closes an answer.
        pack: File that `Pack.save` wrote, or a pack. None: that of the cache folder, made from public packages first
            if it is not there.
        groups: Which of the six.
        lengths: Vision tokens of the long videos to train on.
        test_lengths: Vision tokens of those to be judged by.
        train_size: Training questions of each group, and of each length of a long one.
        test_size: Test questions likewise.
        shares: Group → how many times as many questions of either split it has. Those without one have 1.
        further: More questions on each long video and each page of training, at most, answered one after the other.
        side: Pixels of a frame's side.
        seed: Of all draws.

    Raises:
        DatasetNotInstalled: Pillow is missing.
        UnsupportedModel: The config has no Qwen-VL vision tower, or the tokenizer no end or pad token.
        UnknownGroup: There is no such group; near names are listed.
        ValueError: A size, a share or the number of lengths is below 1, or `further` below 0.
        BadPack: The file is no pack, or the pack has too little for a split.
        VideoTooShort: A length has not three frames.
        NoVisionTokens: A frame is too small for one vision token.
    """

    name = "pictures"

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        pack: str | Path | Pack | None = None,
        groups: Sequence[str] = tuple(GROUPS),
        lengths: Sequence[int] = (1024, 2048, 4096),
        test_lengths: Sequence[int] = (1024, 4096, 16384),
        train_size: int = 10_000,
        test_size: int = 140,
        shares: Mapping[str, int] = MappingProxyType({}),
        further: int = 0,
        side: int = 128,
        seed: int = 0,
    ) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise DatasetNotInstalled(
                'the task pictures needs Pillow, which is not installed: pip install "linmu[demo]"'
            ) from error
        super().__init__(config, tokenizer)
        for group in (*groups, *shares):
            if group not in GROUPS:
                raise UnknownGroup(
                    f"pictures has no group {group!r}.{near(group, GROUPS)} Its groups: {', '.join(GROUPS)}."
                )
        least = min(train_size, test_size, *shares.values())
        if not groups or least < 1 or further < 0 or not (lengths and test_lengths):
            raise ValueError(
                "pictures needs a group, lengths, sizes and shares of at least 1, and no negative number of further "
                f"questions; found groups={list(groups)}, lengths={list(lengths)}, test_lengths="
                f"{list(test_lengths)}, train_size={train_size}, test_size={test_size}, shares={dict(shares)}, "
                f"further={further}"
            )
        self.further, self.seed, self.groups = further, seed, tuple(dict.fromkeys(groups))
        self.pack = pack if isinstance(pack, Pack) else load_pack(pack)
        self.canvas = Canvas(self.pack, side)
        self.frame_tokens = self.patcher.tokens(self.canvas.cut(Frame(()), self.patcher))
        if (shortest := min(*lengths, *test_lengths)) < 3 * self.frame_tokens:
            raise VideoTooShort(
                f"a video of {shortest} vision tokens has less than three frames of {self.frame_tokens} tokens: "
                f"ask for at least {3 * self.frame_tokens}"
            )
        kept, held_out = shelf(self.pack, "train"), shelf(self.pack, "test")
        self.train = Questions(self, kept, "train", sorted(set(lengths)), train_size, shares)
        self.test = Questions(self, held_out, "test", sorted(set(test_lengths)), test_size, shares)
        self.long_videos = {_category(group, length) for group, length in self.test.kinds if group in LONG}
        self.max_new_tokens = 1 + max(map(len, self.answer_ids(sorted(_answers(self.pack)))))

    def captioned(self, count: int) -> list[Item]:
        """Up to `count` training questions on one image whose answer is what it shows."""
        numbers = range(self.train.size if "names" in self.groups else 0)
        items = (self.train.make("names", 0, number) for number in numbers)
        return list(islice((item for item in items if item["form"] in CAPTIONED), count))

    def shown(self, items: Sequence[Item]) -> list[Shown]:
        """The frames of each item, drawn and cut."""
        return [
            Shown([self.canvas.cut(frame, self.patcher) for frame in item["frames"]], item["video"])
            for item in items
        ]

    def size(self, item: Item) -> int:
        """How many tokens a training row has."""
        return self.frame_tokens * len(item["frames"]) + self.text_tokens(item)

    @property
    def trivial(self) -> dict[str, float]:
        """The better of the two baselines in each category."""
        return {category: baseline.best for category, baseline in self.baselines.items()}

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """What trivial answers reach in each category of the test split."""
        shortest = dict(reversed(self.train.kinds))
        learnt: dict[str, tuple[dict[str, Counter[str]], dict[str, Counter[str]]]] = {}
        found = {}
        for (group, length), parts in Counter(self.test.kinds).items():
            if group not in learnt:
                learnt[group] = _counts(self.train.make(group, shortest[group], i) for i in range(SAMPLE))
            items = [self.test.make(group, length, number) for number in range(parts * self.test.size)]
            found[_category(group, length)] = _baseline(items, *learnt[group])
        return found


def _category(group: str, length: int) -> str:
    return f"{group} {length}" if length else group


def _answers(pack: Pack) -> set[str]:
    """Every answer that any question on a pack can have."""
    found = {picture.name for picture in pack.pictures} | {picture.category for picture in pack.pictures}
    found |= {name for country in pack.countries for name in country} | {chart.country for chart in pack.maps}
    found |= {*pack.words, *COLORS, *CORNERS} | {word for shape in pack.shapes for word in shape[:2]}
    return found | {"north", "south", "east", "west", "larger", "smaller", "disappear", "appear", "9999"}


def _counts(items: Iterable[Item]) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """How often each answer came, by the form and by the text of the question."""
    by_form, by_text = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    for item in items:
        by_form[item["form"]][item["answer"]] += 1
        by_text[item["question"]][item["answer"]] += 1
    return by_form, by_text


def _baseline(
    items: Sequence[Item], by_form: Mapping[str, Counter[str]], by_text: Mapping[str, Counter[str]]
) -> Baseline:
    frequent, alone = 0.0, 0.0
    for form in dict.fromkeys(item["form"] for item in items):
        alike = [item for item in items if item["form"] == form]
        usual = by_form[form].most_common(1)[0][0]
        told = [
            by_text[i["question"]].most_common(1)[0][0] if i["question"] in by_text else usual for i in alike
        ]
        guessed = sum(1 / item["choices"] for item in alike if item["choices"])
        frequent += sum(item["answer"] == usual for item in alike)
        alone += max(guessed, sum(item["answer"] == answer for item, answer in zip(alike, told)))
    return Baseline(frequent / len(items), alone / len(items))
