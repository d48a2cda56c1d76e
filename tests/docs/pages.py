"""The pages that users read, and the fenced blocks on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why_not>.+?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: After the opening fence.
        body: Its text.
        line: Line of the page where the body begins, from 1.
        why_not: Reason given by ``<!-- not run: reason -->`` on the line before it, if any.
    """

    language: str
    body: str
    line: int
    why_not: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["body"], text.count("\n", 0, m.start("body")) + 1, m["why_not"])
        for m in FENCE.finditer(text)
    ]


def blocks_of(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == language]
