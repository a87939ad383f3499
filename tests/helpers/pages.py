"""The pages of the documentation: code blocks, commands, links and anchors."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block. A comment `<!-- not run: why -->` before it is not shown, and keeps it from being run."""

    language: str
    code: str
    runs: bool


def blocks(page: Path, language: str) -> list[Block]:
    found = re.findall(r"(<!-- not run: [^>]*-->\n)?^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(name, code, not comment) for comment, name, code in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every call of our command line, in shell blocks and between backquotes in the text."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines = re.findall(r"`([^`\n]+)`", text)
    for block in blocks(page, "bash"):
        lines += block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        call = re.search(r"(?:^|[ /])(?:app\.py|dgc)(?: +|$)(.*)", line)
        words = shlex.split(call[1], comments=True) if call else []
        if words and words[0] != "COMMAND" and not words[0].startswith("-"):
            found.append(words)
    return found


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.add(f"{name}-{number}" if number else name)
    return found
