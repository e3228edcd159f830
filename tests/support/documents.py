"""The documents of the repository: README, the documentation site, and the pages for contributors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").rglob("*.md"))
CONTRIBUTORS = [
    ROOT / name
    for name in ("CONTRIBUTING.md", "benchmarks/README.md", "gconv/kernels/README.md", "resnext/README.md")
]
ALL = [README, *SITE, *CONTRIBUTORS]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        language: the word after the fence, or empty. Tests run "python"; "py" needs other packages.
        text: its lines.
    """

    language: str
    text: str


def name_of(document: Path) -> str:
    """Return the path of a document in the repository, such as "docs/faq.md"."""
    return document.relative_to(ROOT).as_posix()


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    return [Block(language, text) for _, language, text in FENCE.findall(document.read_text())]


def commands(document: Path) -> list[str]:
    """Return the commands that a document shows: lines of console blocks, and code in running text."""
    text = FENCE.sub("", document.read_text())
    in_text = re.findall(r"`((?:python -m |make |resnext )[^`\n]*)`", text)
    in_blocks = [
        line.removeprefix("$ ").partition("  #")[0].strip()
        for block in blocks(document)
        if block.language == "console"
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    return [*in_blocks, *in_text]


def site_text() -> str:
    """Return the text of README and all pages of the site."""
    return "\n".join(page.read_text() for page in [README, *SITE])
