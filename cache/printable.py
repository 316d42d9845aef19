"""Text of others as it may be shown: what a terminal would obey, or what turns or hides letters, is spelled out."""

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (bidi marks among them), surrogates, ends of lines


def printable(text: str) -> str:
    """The text in one line of letters that can all be seen: an escape character becomes \\x1b, a bidi mark \\u202e."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if unicodedata.category(c) in HIDDEN else c for c in text)


def _spelled(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
