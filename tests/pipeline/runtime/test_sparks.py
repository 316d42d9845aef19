"""Numbers as letters."""

from sae.pipeline.runtime.sparks import bar, sparkline, thinned


def test_a_sparkline_goes_from_the_largest_to_the_smallest() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, 2.0], plain=True) == "__" and sparkline([]) == ""


def test_thinned_values_keep_their_number_and_the_last() -> None:
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
    assert thinned([*range(100)], 4) == [24, 49, 74, 99]


def test_a_bar_is_as_long_as_its_share_and_never_empty() -> None:
    assert [bar(share, 8, plain=True) for share in (0.0, 0.001, 0.5, 1.0)] == ["", "#", "####", "########"]
