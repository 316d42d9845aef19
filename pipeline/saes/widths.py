"""The widths of rows, which may be of several stores, side by side."""

Width = int | tuple[int, ...]
"""The width of rows, or the widths of the stores whose rows lie side by side in them."""


def widths(of: Width) -> tuple[int, ...]:
    """The width of each store."""
    return (of,) if isinstance(of, int) else of
