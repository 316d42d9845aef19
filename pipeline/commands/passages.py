"""Tokens on a terminal: text of strangers, spelled so that it can do nothing, marked where a latent fires.

Where there are colours, a token is shaded by how strongly the latent fires. Elsewhere it stands in brackets, the one
that the passage is about in double ones.
"""

import codecs
import math
from collections.abc import Sequence

from rich.text import Text

from sae.cache.printable import printable
from sae.pipeline.commands import console

SHADES = ("on grey15", "on grey23", "on dark_green", "on green4", "on green3")
PEAK = "bold underline"


def spelled(tokens: Sequence[bytes]) -> list[str]:
    """Each token as letters that can be seen.

    A character split over tokens stands where it is complete; bytes before that, and such as are no text, are spelled
    as \\xe2, and so are line ends, control characters and marks that turn the direction of a line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    last = len(tokens) - 1
    texts = [decoder.decode(token, final=i == last) for i, token in enumerate(tokens)]
    return [_seen(text) if text else _bytes(token) for text, token in zip(texts, tokens, strict=True)]


def _seen(text: str) -> str:
    stray = {letter: f"\\x{ord(letter) - 0xDC00:02x}" for letter in text if 0xDC80 <= ord(letter) <= 0xDCFF}
    return "".join(stray.get(letter) or printable(letter) for letter in text)


def _bytes(token: bytes) -> str:
    return "".join(f"\\x{one:02x}" for one in token)


def quoted(token: bytes) -> str:
    """A token by itself, in quotes that show its blanks."""
    return f'"{spelled([token])[0]}"'


def passage(tokens: Sequence[bytes], values: Sequence[float | None], peak: int, largest: float) -> Text:
    """Tokens in one line, marked where a latent has values (None: nobody looked), of which the largest there is."""
    line = Text()
    coloured = console.out.is_terminal and console.out.color_system is not None and not console.out.no_color
    for i, (text, value) in enumerate(zip(spelled(tokens), values, strict=True)):
        if coloured:
            share = min(1.0, abs(value or 0.0) / largest) if largest > 0 else 0.0
            shade = SHADES[max(0, math.ceil(share * len(SHADES)) - 1)] if share else ""
            line.append(text, f"{PEAK} {shade}".strip() if i == peak else shade or None)
        else:
            depth = 2 if i == peak else int(bool(value))
            line.append(f"{'[' * depth}{text}{']' * depth}")
    return line


def say(*parts: str | Text) -> None:
    """One line of result on stdout, of which some parts are marked."""
    line = Text()
    for part in parts:
        line.append_text(part if isinstance(part, Text) else Text(printable(part)))
    console.out.print(line, soft_wrap=True)
