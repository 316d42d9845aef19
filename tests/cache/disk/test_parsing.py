"""What is no JSON of ours is refused in a few words, and never by a traceback."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.disk import parsing
from sae.cache.disk.parsing import inner, is_plain_name, name_of_file, parse, parsed_mapping, text, whole

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=3), inside, max_size=4),
    max_leaves=10,
)  # fmt: skip


@some
@given(values)
def test_what_json_says_is_read(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{}\0", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a": 1, "a": 2}', '"a" is said twice'),
        (b'[{"b": {"a": 1, "a": 1}}]', '"a" is said twice'),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number of JSON"),
        (b'{"a": 1e999}', "1e999 is beyond what a number holds"),
        (b'{"a": ' + b"9" * 41 + b"}", "a number of 41 digits"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a number of 10000 digits"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'["\\ud800"]', "half a surrogate pair in a text"),
    ],
)
def test_what_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        parse(data)


def test_what_is_just_allowed() -> None:
    assert parse(b"[" * 64 + b"]" * 64)
    assert parse(b'["\\ud83d\\ude00"]') == ["😀"]
    assert parse(json.dumps("[" * 1000).encode()) == "[" * 1000


def test_a_file_of_any_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="more than 1 MiB"):
        parse(b'"' + b"a" * (1 << 20) + b'"')


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [], -1, 1 << 70])
def test_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"n is .*, not a whole number from 0 to 9,223,372,036,854,775,807"):
        whole({"n": value}, "n")
    assert whole({"n": 3}, "n", 1, 3) == 3


def test_a_text_and_an_object() -> None:
    for value in (None, 1, "a\nb", "\x1b[2J", "\x9b", "a" * 256):
        with pytest.raises(ValueError, match=r"a is .*, not a text"):
            text({"a": value}, "a")
    assert text({"a": "ü b"}, "a") == "ü b"
    for wrong in (b"[]", b"3", b'"a"', b"null"):
        with pytest.raises(ValueError, match="where an object should be"):
            parsed_mapping(wrong)
    with pytest.raises(ValueError, match="a is missing"):
        inner({}, "a")


@pytest.mark.parametrize(
    "value", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", "a\n", "~", "-rf", "C:", "s3:", "ü", "a" * 256, 3]
)
def test_a_name_stays_where_it_is_put(value: Any) -> None:
    with pytest.raises(ValueError, match="not the name of a file or folder"):
        name_of_file({"key": value}, "key")
    assert is_plain_name("gpt2-6.mlp_out-text-int8-1234abcd")
