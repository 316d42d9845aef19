"""What is asked and how answers are read, whatever the text and the answers say."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.pipeline.explain.backend import Unusable
from sae.pipeline.explain.corpus import Window, spelled
from sae.pipeline.explain.prompts import Form, asking, brackets, explaining, marked
from sae.pipeline.explain.questions import Question

TRUTHS, NUMBERS = Form(3, 1), Form(2, 10)


def window(*texts: str, fires: int = 0) -> Window:
    activations = tuple(2.0 if i == fires else 0.0 for i in range(len(texts)))
    return Window(tuple(range(len(texts))), texts, activations, 0, 0)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6), st.text(max_size=30))
@settings(deadline=None, max_examples=25)
def test_text_can_end_nothing_that_it_is_put_into(texts: list[str], explanation: str) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    explanation = explanation.encode("utf-8", "replace").decode()
    one = window(*texts)
    left, right = brackets([one])
    assert left not in one.text and right not in one.text
    for scoring, truth in (("detection", (1.0,)), ("fuzzing", (1.0,)), ("simulation", one.activations)):
        request = asking(explanation, Question(scoring, (one,), (one.fires,), truth))  # type: ignore[arg-type]
        said = json.loads(request.user)
        assert said.pop("explanation") == explanation and len(said) == 1
        (inside,) = said.values()
        assert [*inside] == request.form.keys
        plain = "".join(inside.values()).replace(left, "").replace(right, "")
        assert plain == one.text and "ignore" not in request.system.lower()
    shown = json.loads(explaining([one]).user)
    assert shown["contexts"][0]["active"] == [[texts[0], 10]]


def test_marks_stand_around_runs_of_tokens() -> None:
    one = window("a", "b", "c", "d")
    assert marked(one, (False, True, True, False), "<<", ">>") == "a<<bc>>d"
    assert marked(one, (True, False, False, True), "<<", ">>") == "<<a>>bc<<d>>"
    assert brackets([window("x << y >>>")]) == ("<<<<", ">>>>")


RIGHT = '{"1": true, "2": false, "3": true}'
WRONG: dict[Form, list[str]] = {
    TRUTHS: [
        "", "  \n", "yes", "[]", "{}", "null", '{"1": true}', '{"active": []}', "[" * 100_000, "\ud800",
        RIGHT.replace("}", ', "4": true}'), f"Sure! {RIGHT}", RIGHT + RIGHT, RIGHT.replace("false", "null"),
        '{"1": 1, "2": 0, "3": 1}', '{"1": "true", "2": "false", "3": "true"}', '{"1": true, "1": true, "2": true}',
    ],
    NUMBERS: [f'{{"1": {said}, "2": 0}}' for said in ("11", "-1", "1.5", "true", "NaN", "1e9", '"3"', "[3]")],
    Form(): [
        *(f'{{"explanation": {said}}}' for said in ('""', '" "', "3", "null", '["x"]', json.dumps("x" * 9999))),
        '{"Explanation": "x"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("answer", [RIGHT, f"```json\n{RIGHT}\n```", f"  {RIGHT}\n"])
def test_an_answer_of_the_form_is_read(answer: str) -> None:
    assert TRUTHS.read(answer) == [1, 0, 1]
    assert NUMBERS.read('{"2": 10, "1": 0}') == [0, 10]
    assert Form().read('{"explanation": " two\\n lines "}') == "two lines"


@pytest.mark.parametrize(("form", "answer"), [(form, answer) for form, answers in WRONG.items() for answer in answers])
def test_any_other_answer_is_unusable_and_never_a_score(form: Form, answer: str) -> None:
    with pytest.raises(Unusable, match=r"answer|explanation"):
        form.read(answer)


def test_a_schema_says_what_is_read() -> None:
    assert TRUTHS.schema()["required"] == ["1", "2", "3"] and TRUTHS.schema()["properties"]["1"] == {"type": "boolean"}
    assert NUMBERS.schema()["properties"]["2"]["enum"] == [*range(11)] and not Form().schema()["additionalProperties"]


def test_split_characters_stand_where_they_are_whole() -> None:
    assert spelled([b"a", b"\xe2\x82", b"\xac!", b"\xff"]) == ("a", "", "€!", "\ufffd")
