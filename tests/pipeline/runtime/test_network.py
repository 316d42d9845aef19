"""Hubs that are silent, broken, closed or something else: a limit, a word, a few more tries, then the cache."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_hub import COMMIT, Fault, Hub, hub
from support.small_tokenizers import write_tokenizer

from sae.cache.errors import SaeError
from sae.pipeline.language_model.files import find_model
from sae.pipeline.runtime import network
from sae.pipeline.runtime.network import Refused, snapshot
from sae.pipeline.tokenize.sources.hub import HubSource
from sae.pipeline.tokenizers.tokenizer import tokenizer

NAME = "someone/some-llama"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one small model; silence and pauses are short."""
    monkeypatch.setattr(network, "SILENCE", 0.3)
    monkeypatch.setattr(network, "PAUSE", 0.01)
    folder = write_tokenizer(tmp_path / "model", "SmolLM")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with hub({NAME: folder}, tmp_path / "cache") as found:
        yield found


def test_files_come_and_the_cache_serves_without_the_hub(there: Hub) -> None:
    folder = snapshot(NAME, ["*.json"])
    assert folder.name == COMMIT
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    asked = len(there.asked)
    assert snapshot(NAME, ["*.json"], offline=True) == folder
    assert len(there.asked) == asked


def test_a_tokenizer_takes_small_files_only_and_is_not_fetched_twice(there: Hub) -> None:
    tok = tokenizer(f"hf:{NAME}")
    assert (tok.slug, tok.n_vocab) == ("some-llama", 480)
    assert not any("safetensors" in path for path in there.asked)
    asked = len(there.asked)
    assert tokenizer(f"hf:{NAME}", offline=True).recipe() == tokenizer(f"hf:{NAME}").recipe() == tok.recipe()
    assert len(there.asked) == asked


def test_a_tokenizer_is_that_of_its_folder(there: Hub) -> None:
    digest = tokenizer(str(there.models[NAME])).recipe()["digest"]
    assert tokenizer(f"hf:{NAME}").recipe()["digest"] == digest


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(there: Hub, status: int, caplog: pytest.LogCaptureFixture) -> None:
    there.faults = [Fault("/api/", status, headers={"Retry-After": "0"}, times=2)]
    assert snapshot(NAME, ["*.json"]).name == COMMIT
    words = [record.message for record in caplog.records if record.name == "sae.pipeline.runtime.network"]
    assert len(words) == 2
    assert all(word.startswith(NAME) and "trying again" in word for word in words)


@pytest.mark.parametrize("status", [429, 500])
def test_but_not_for_ever(there: Hub, status: int) -> None:
    there.faults = [Fault("/api/", status)]
    with pytest.raises(Refused, match="too many requests" if status == 429 else "has a fault"):
        snapshot(NAME, ["*.json"])
    assert len(there.asked) == network.TRIES


def test_silence_has_a_limit_and_a_word_and_then_the_cache(there: Hub, caplog: pytest.LogCaptureFixture) -> None:
    folder = snapshot(NAME, ["*.json", "*.safetensors"])
    there.faults = [Fault("/", silent=2)]
    assert find_model(NAME).folder == folder
    words = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("does not answer" in word and "local cache" in word for word in words)


def test_silence_without_a_cache_is_an_error(there: Hub) -> None:
    there.faults = [Fault("/", silent=2)]
    for what in (lambda: find_model(NAME), lambda: tokenizer(f"hf:{NAME}")):
        with pytest.raises(SaeError, match=r"does not answer within") as caught:
            what()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize("body", ["<html>log in</html>", "[]", "null", '{"a": 1}', ""])
def test_what_is_no_hub(there: Hub, where: str, body: str) -> None:
    there.faults = [Fault(where, 200, body)]
    for what in (lambda: find_model(NAME), lambda: tokenizer(f"hf:{NAME}")):
        with pytest.raises(SaeError) as caught:
            what()
        assert "\n" not in str(caught.value)
        assert NAME in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {"X-Error-Message": "Invalid username or password."}, "has no such model"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "does not know your token"),
        (401, {"X-Error-Code": "GatedRepo"}, "accept the terms at"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept the terms at"),
        (403, {}, "forbids it"),
        (404, {"X-Error-Code": "RepoNotFound"}, "has no such model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such branch, tag or commit"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "forbids it"),
        (418, {}, "the hub refuses (status 418)"),
    ],
)
def test_refusals_are_said_plainly_and_once(there: Hub, status: int, headers: dict[str, str], said: str) -> None:
    there.faults = [Fault("/api/", status, headers=headers)]
    for what, option in ((lambda: find_model(NAME), "model = "), (lambda: tokenizer(f"hf:{NAME}"), "tokenizer = hf:")):
        there.asked.clear()
        with pytest.raises(SaeError) as caught:
            what()
        assert said in str(caught.value)
        assert str(caught.value).startswith(option)
        assert "Client Error" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(there.asked) == 1


def test_files_that_are_gated_while_the_page_is_not(there: Hub) -> None:
    there.faults = [Fault("/resolve/", 403, headers={"X-Error-Code": "GatedRepo"})]
    with pytest.raises(SaeError, match=r"accept the terms at http://127\.0"):
        find_model(NAME)


def test_a_name_that_is_not_there(there: Hub) -> None:
    with pytest.raises(SaeError, match=r"model = someone/else: the hub has no such model"):
        find_model("someone/else")


def test_a_model_that_is_gone_is_taken_from_the_cache(there: Hub, caplog: pytest.LogCaptureFixture) -> None:
    folder = snapshot(NAME, ["*.json", "*.safetensors"])
    shutil.rmtree(there.models.pop(NAME))
    assert find_model(NAME).folder == folder
    assert any("no such model" in record.message and "local cache" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("/api/", 401, headers={"X-Error-Message": "Invalid username or password."}), "has no such data set"),
        (Fault("/api/", 403, headers={"X-Error-Code": "GatedRepo"}), "accept the terms at"),
        (Fault("/api/", 403), "forbids it"),
        (Fault("/api/", 500), "has a fault"),
        (Fault("/api/", 429), "too many requests"),
        (Fault("/api/", 200, "<html>log in</html>"), "not as a hub does"),
        (Fault("/api/", silent=2), "does not answer within"),
    ],
)
def test_data_sets_are_refused_in_the_same_words(there: Hub, fault: Fault, said: str) -> None:
    there.faults = [fault]
    with pytest.raises(SaeError, match=rf"^source = someone/texts: .*{said}") as caught:
        HubSource("hub:someone/texts", "text").recipe()
    assert str(caught.value).isprintable()


def test_a_download_has_a_limit(there: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = network.hub_address()
    there.faults = [Fault("/silent", silent=2)]
    with pytest.raises(OSError, match="timed out"):
        network.download(f"{address}/silent")
    assert network.download(f"{address}/{NAME}/resolve/main/config.json") == b'{"model_type": "llama"}'
