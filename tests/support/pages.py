"""The pages of the project: README and docs, their shell blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}


SHELLS = ("console", "bash", "sh", "shell")


def blocks(text: str) -> list[str]:
    """A page's shell blocks, with their fences."""
    found = re.finditer(r"^```(\w+)\n.*?^```", text, re.MULTILINE | re.DOTALL)
    return [block[0] for block in found if block[1] in SHELLS]


def shell_lines(text: str) -> Iterator[str]:
    """The commands in a page's shell blocks: the lines after a prompt where there are prompts, else all."""
    for block in blocks(text):
        lines = block.replace("\\\n", " ").splitlines()[1:-1]
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        yield from prompted or lines


def typed(text: str, program: str) -> list[list[str]]:
    """Arguments of every call of a program in a page's shell blocks."""
    found = []
    for line in shell_lines(text):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in ("&&", ";", "|", "||"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):  # NAME=value in front
                words = words[1:]
            if words and words[0] == program:
                found.append(words[1:])
            words = []
    return found
