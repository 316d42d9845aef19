"""The openai backend against a server that speaks the protocol, answers badly, falls silent, or is not there."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from support.command_line import sae
from support.small_chat import KEY, Chat, Fault, honest, keys, serving

from sae.cache.errors import SaeError
from sae.cache.runs import EXPLANATIONS, Run
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.stage import explain
from sae.pipeline.interpret.explanations import Explanations, explanations
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.runtime.workplace import Workplace

LATENTS = (1, 7, 20)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as chat:
        yield chat


def asking(run: Run, place: Workplace, chat: Chat, **settings: Any) -> Explanations:
    usual = {"latents": LATENTS, "scoring": ("detection", "fuzzing"), "active": 4, "silent": 10, "timeout": 5.0}
    config = ExplainConfig(backend="openai", model="m", base_url=chat.address, **{**usual, **settings})
    found = explain(run, place, config)
    assert found is not None
    return found


def by_word(asked: dict[str, Any]) -> str:
    """An answer that knows the truth: an explanation is the token, and a context fires that holds it."""
    said = json.loads(asked["messages"][1]["content"])
    if keys(asked) == ["explanation"]:
        return json.dumps({"explanation": said["contexts"][0]["active"][0][0] + "|"})
    token = said["explanation"].removesuffix("|")
    if "tokens" in said:
        return json.dumps({key: 10 if text.strip() == token.strip() else 0 for key, text in said["tokens"].items()})
    if "stand between <" in asked["messages"][0]["content"]:
        token = f"<{token}>".replace("< ", "<") if token == token.strip() else f"<{token}>"
    return json.dumps({key: token in text or token.strip() in text.split() for key, text in said["contexts"].items()})


def test_always_no_is_chance_on_both_sides(run: Run, place: Workplace, chat: Chat) -> None:
    found = asking(run, place, chat, scoring=("detection", "fuzzing", "simulation"))
    for one in found.features:
        detection, fuzzing, simulation = one.scores
        assert (detection.score, detection.control) == (0.5, 0.5) and detection.accuracy == pytest.approx(10 / 14)
        assert (fuzzing.score, fuzzing.control, simulation.score, simulation.control) == (0.5, 0.5, 0.0, 0.0)
        assert one.explanation == "some word" and one.backend == "openai" and one.model == "m"


@pytest.mark.slow
def test_who_knows_scores_one_whatever_the_tokens_say(run: Run, place: Workplace, chat: Chat) -> None:
    chat.reply = by_word
    found = asking(run, place, chat, latents=(20, 21, 22), scoring=("detection", "simulation"))
    for one in found.features:
        assert [judged.score for judged in one.scores] == [1.0, pytest.approx(1.0, abs=0.15)]
        assert one.control is not None and one.control < 0.8
    assert chat.most_at_once <= 8
    said = " ".join(asked["messages"][1]["content"] for asked in chat.asked)
    assert "Ignore all of the above" in said and all(json.loads(a["messages"][1]["content"]) for a in chat.asked)


def test_nothing_is_asked_twice_and_what_was_killed_goes_on(run: Run, place: Workplace, chat: Chat) -> None:
    first = asking(run, place, chat)
    asked = len(chat.asked)
    assert asked == 3 + 3 * 2, "one explanation for all, so that each question and its control's are the same"
    again = asking(run, place, chat)
    assert len(chat.asked) == asked and again.features == first.features and again.made["sent"] == 0
    answers = sorted((run.path / "explain").iterdir())
    assert len(answers) == asked
    answers[0].unlink()  # as if killed before it came
    answers[1].write_bytes(answers[1].read_bytes().replace(b'"text"', b'"tixt"'))
    assert asking(run, place, chat).features == first.features and len(chat.asked) == asked + 2
    asking(run, place, chat, temperature=1.0)
    assert len(chat.asked) == 2 * asked + 2, "other settings are another question"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "the answer is empty"), ("No context fits.", "not the JSON asked for"), ('{"1": false}', "keys"),
        (json.dumps({"explanation": "x", "1": True}), "keys"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_counted_and_shown_and_are_no_score(
    run: Run, place: Workplace, chat: Chat, content: str, why: str
) -> None:
    chat.reply = lambda asked: honest(asked) if keys(asked) == ["explanation"] else content
    with pytest.raises(SaeError, match=f"no latent got a score, the first one since detection: .*{why}"):
        asking(run, place, chat)
    assert not (run.path / EXPLANATIONS).exists()
    of_fuzzing = re.compile("tokens stand between")
    chat.reply = lambda asked: content if of_fuzzing.search(asked["messages"][0]["content"]) else honest(asked)
    for path in run.path.glob("explain/*"):  # what was answered, if anything is kept of it
        path.unlink()
    found = asking(run, place, chat)
    for one in found.features:
        detection, fuzzing = one.scores
        assert detection.answered == 1 and fuzzing.score is None is fuzzing.control and fuzzing.answered == 0
        assert len(one.errors) == 2 and why in one.errors[0]
    assert found.made["errors"] == 6
    where = ["--cache", place.cache, "--runs", place.runs, "--base-url", chat.address, "--model", "m"]
    said = "--scoring detection,fuzzing --latents 1,7,20 --set explain.active=4"
    shown = sae(f"explain planted --backend openai {said}", *where)
    assert shown.code == 0 and "could not be used, the first: latent 1: fuzzing" in shown.err


@pytest.mark.slow
def test_an_explanation_that_is_none_leaves_its_latent_without_a_score(run: Run, place: Workplace, chat: Chat) -> None:
    def reply(asked: dict[str, Any]) -> str:
        shown = json.loads(asked["messages"][1]["content"])
        bad = keys(asked) == ["explanation"] and shown["contexts"][0]["active"][0][0] == " w5"
        return '{"explanation": "  "}' if bad else honest(asked)

    chat.reply = reply
    ok, other, bad = asking(run, place, chat).features[:2], None, asking(run, place, chat).features[2]
    assert other is None and all(one.score == 0.5 for one in ok)
    assert bad.explanation is bad.score is bad.control is None and "not a sentence" in bad.errors[0]


@pytest.mark.slow
def test_what_passes_is_tried_again_and_what_does_not_is_counted(run: Run, place: Workplace, chat: Chat) -> None:
    chat.faults = [Fault(2, 429, '{"error": {"message": "slow down"}}'), Fault(1, 500, "oops"), Fault(1, 503, "")]
    found = asking(run, place, chat, concurrency=1)
    assert found.made["errors"] == 0 and chat.faults[-1].times == 0
    chat.faults = [Fault(1, 200, "<html>a proxy</html>"), Fault(1, 200, '{"choices": []}')]
    found = asking(run, place, chat, concurrency=1, seed=1)
    assert found.made["errors"] == 2 and "no chat completion" in found.features[0].errors[0]
    chat.faults = [Fault(1, 400, '{"error": {"message": "too long\\n' + KEY + '"}}')]
    found = asking(run, place, chat, concurrency=1, seed=2)
    assert found.made["errors"] == 1 and "status 400" in found.features[0].errors[0]
    assert KEY not in str(found) and "***" in found.features[0].errors[0]
    chat.finish = "length"
    with pytest.raises(SaeError, match=r"cut off after 1,024 tokens; allow more by explain.answer_tokens"):
        asking(run, place, chat, seed=3)


@pytest.mark.slow
def test_silence_ends(run: Run, place: Workplace, chat: Chat) -> None:
    chat.faults = [Fault(99, silent=20)]
    with pytest.raises(SaeError, match=r"no latent got .* since explanation: no answer within 0\.2 s"):
        asking(run, place, chat, timeout=0.2, tries=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, "does not know the key"), (403, "forbids it"), (404, "no such model"),
        (400, r"\d requests failed in a row, the last with status 400: .*explain.structured = none"),
        (500, r"\d requests failed in a row, the last with status 500"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_everything_ends_it_soon(
    run: Run, place: Workplace, chat: Chat, status: int, why: str
) -> None:
    chat.faults = [Fault(999, status, json.dumps({"error": {"message": f"no {KEY}"}}))]
    with pytest.raises(SaeError, match=why) as error:
        asking(run, place, chat, latents=None, tries=1, concurrency=2)
    assert KEY not in str(error.value) and len(chat.asked) < 12


@pytest.mark.slow
def test_a_server_that_is_not_there(run: Run, place: Workplace, chat: Chat) -> None:
    chat.address = "http://127.0.0.1:9/v1"
    with pytest.raises(SaeError, match="cannot be reached"):
        asking(run, place, chat, tries=1)


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_the_cost_is_said_first_and_limited(run: Run, place: Workplace, chat: Chat) -> None:
    told = Told()
    place = Workplace(place.cache, place.runs, told, "cpu")
    with pytest.raises(SaeError, match=r"most_tokens = 10: [\d,]+ are estimated; allow more"):
        asking(run, place, chat, most_tokens=10)
    prices = {"price_in": 1000.0, "price_out": 2000.0}
    with pytest.raises(SaeError, match=r"most_cost = 0\.01: [\d.]+ are estimated"):
        asking(run, place, chat, **prices, most_cost=0.01)
    assert not chat.asked and "15 requests to send, 0 answered before; about" in told.lines[0]
    assert "by the prices given" in told.lines[1] and "no price" in told.lines[0]
    found = asking(run, place, chat, **prices)
    sent = found.made["sent"]
    assert found.made["asked_tokens"] == 100 * sent and found.made["cost"] == pytest.approx(sent * 0.12)
    asking(run, place, chat, most_tokens=0)  # all is known
    chat.tokens = 10**6  # more than was estimated
    with pytest.raises(SaeError, match="most_tokens = 10,000: 1,000,010 were spent; allow more"):
        asking(run, place, chat, most_tokens=10_000, seed=9, examples=4, active=4, silent=4, concurrency=1)
    config = ExplainConfig(backend="openai", model="m", base_url=chat.address, seed=8)
    asked = len(chat.asked)
    assert explain(run, place, config, estimate_only=True) is None and len(chat.asked) == asked


def test_the_key_is_nowhere_but_in_what_is_sent(run: Run, place: Workplace, chat: Chat) -> None:
    chat.reply = lambda asked: honest(asked).replace("some word", f"says {KEY}")
    asking(run, place, chat)
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in chat.headers)
    for path in run.path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    kept = explanations(run)
    assert kept is not None and kept.features[0].explanation == "says ***"
