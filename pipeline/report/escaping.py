"""Text of others as HTML."""

import html

from sae.cache.printable import printable


def escape(text: str) -> str:
    """HTML of a text, for the inside of an element or of an attribute in quotes. Lines stay lines."""
    return html.escape("\n".join(map(printable, text.split("\n"))))
