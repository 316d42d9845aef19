"""Numbers as letters, for terminals: a course of values in one line, an amount as a bar."""

from collections.abc import Sequence

SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.-=+*%#"


def sparkline(values: Sequence[float], *, plain: bool = False) -> str:
    """Draw values as letters, whose heights are those between the smallest and the largest. plain: in ASCII."""
    if not values:
        return ""
    sparks, low, high = PLAIN_SPARKS if plain else SPARKS, min(values), max(values)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    return "".join(sparks[round((value - low) * scale)] for value in values)


def thinned(values: Sequence[float], length: int) -> list[float]:
    """At most so many of the values, evenly spaced; the last one is kept."""
    if len(values) <= length:
        return [*values]
    return [values[round((i + 1) * len(values) / length) - 1] for i in range(length)]


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """A bar as long as a share of `width`; what is more than nothing has a letter at least. plain: in ASCII."""
    return ("#" if plain else "█") * max(round(share * width), int(share > 0))
