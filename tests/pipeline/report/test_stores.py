"""The part of a report that is about several stores, of a file that may not be ours."""

from typing import Any

import pytest

from sae.pipeline.report.stores import stores_html

ONE = {"fvu": 0.125, "decoder_shares": [3, 0, 1]}
ALONE = {"degradation": {"value": 0.25}, "kl": {"value": 0.5}}


def test_a_row_for_each_store_and_the_triangle() -> None:
    details = {
        "stores": {"0.a": ONE, "1.<b>": ONE},
        "downstream_alone": {"0.a": ALONE},
        "decoder_triangle": [[1.5, 2.5], [None, 3.5]],
    }
    html = stores_html({"details": details})
    assert html.count("data-chart=") == 2 and "1.<b>" not in html and "1.&lt;b&gt;" in html
    assert (
        all(number in html for number in ("0.125", "0.25", "0.5", "1.5", "2.5", "3.5"))
        and html.replace("Latents", "").count('<td class="n">–') == 3
    )


def test_there_is_none_of_one_store() -> None:
    assert stores_html({}) == stores_html({"details": None}) == stores_html({"details": {"stores": None}}) == ""


@pytest.mark.parametrize("lie", [None, True, "x", -1, 1e999, [], {}, [[]], [1.5], {"value": "x"}, [[True, "x"]]])
@pytest.mark.parametrize("where", ["fvu", "decoder_shares", "downstream_alone", "decoder_triangle", "stores"])
def test_what_is_no_number_is_shown_as_none(where: str, lie: Any) -> None:
    details: dict[str, Any] = {"stores": {"0.a": ONE}, "downstream_alone": {"0.a": ALONE}}
    if where in ONE:
        details["stores"] = {"0.a": ONE | {where: lie}}
    else:
        details[where] = lie
    assert isinstance(stores_html({"details": details}), str)
