"""Numbers as people write them."""


def number(value: float, digits: int = 4) -> str:
    """A number as a person writes it: 12,345 or 0.0123 or 1.2M or 3e-7."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.{digits}g}G" if size >= 1e9 else f"{value / 1e6:.{digits}g}M"
    if size >= 10 ** (digits - 1) or (value == int(value) and size >= 1):
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    return f"{value:.{digits}g}" if size >= 1e-4 else f"{value:.{min(digits, 2)}g}".replace("e-0", "e-")


def steady(value: float) -> str:
    """A number with three digits always, so that a column of them reads as one."""
    return f"{value:#.3g}".removesuffix(".") if 1e-3 <= abs(value) < 999.5 else number(value, 3)


def percent(share: float) -> str:
    """A share as a percentage with three digits."""
    return f"{steady(100 * share)} %"


def superscript(power: int) -> str:
    """An exponent in raised digits."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
