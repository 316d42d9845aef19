"""Where a dictionary is: on this machine, or in a repository of the hub, of which it alone is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.saes_kit import one_thread
from support.small_formats import dictionary_learning, gemma_scope, qwen_scope
from support.small_hub import Hub, hub

import sae
from sae.cache.errors import NotFound
from sae.pipeline import formats
from sae.pipeline.formats.located import located

single = pytest.fixture(autouse=True, scope="module")(one_thread)
LEARNED, GEMMA, QWEN = dictionary_learning()["AutoEncoder"], gemma_scope()["npz"], qwen_scope()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a repository of several dictionaries in folders, one with a dictionary at its top, one of files."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    many, top, layers = tmp_path / "many", tmp_path / "top", tmp_path / "layers"
    for layer in ("layer_0", "layer_1"):
        LEARNED.inside = f"trained/{layer}"
        LEARNED.put(many)
        (many / LEARNED.inside / "checkpoint.bin").write_bytes(b"large")
    LEARNED.inside = "."
    LEARNED.put(top)
    QWEN.inside, inside = ".", QWEN.inside
    QWEN.put(layers)
    QWEN.inside = inside
    models = {"one/many": many, "one/top": top, "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3": layers}
    with hub(models, tmp_path / "hub") as found:
        yield found


def test_a_folder_of_a_repository(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = located("one/many/trained/layer_1")
    LEARNED.expect(formats.read(where).dictionary)
    assert not [asked for asked in server.asked if "checkpoint.bin" in asked or "layer_0" in asked]
    LEARNED.expect(sae.read("one/many/trained/layer_1/"))
    LEARNED.expect(sae.read("one/top@main"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    LEARNED.inside = "one/top"
    assert located(str(LEARNED.put(tmp_path).relative_to(tmp_path))) == Path("one/top")  # what is here comes first


def test_a_file_of_a_repository(server: Hub) -> None:
    dictionary = sae.read("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3/layer5.sae.pt")
    QWEN.expect(dictionary)
    assert dictionary.metadata.hook == "blocks.5.hook_resid_post"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("one/many", "has no dictionary in a format that is known at its top; name the folder inside of it"),
        ("one/many/trained", "has no dictionary in a format that is known there"),
        ("one/many/nothing", "has no dictionary in a format that is known there"),
        ("one/nothing", "one/nothing: is not a folder here, and on the hub: the hub has no such model"),
        ("one/many/../../x", "leads out of its repository"),
    ],
)
def test_what_a_repository_has_not(server: Hub, source: str, says: str) -> None:
    with pytest.raises(NotFound) as caught:
        located(source)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_offline_is_said_at_once(server: Hub) -> None:
    with pytest.raises(NotFound, match="one/new: is not a folder here, and on the hub: offline was asked for"):
        located("one/new", offline=True)
    assert not server.asked
    located("one/top")
    LEARNED.expect(sae.read("one/top", offline=True))  # what was fetched before


def test_what_is_no_name_of_the_hub_is_a_path() -> None:
    for source in ("/no/such", "./no/such", "~/no/such", "nothing", "a b/c", ""):
        assert located(source) == Path(source).expanduser()
    assert GEMMA.said is None
