"""Which store or run a name means; nothing is ever guessed."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_stores import CHUNK, activation_recipe, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache import catalogue
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.locks import Lock
from sae.cache.errors import Busy, DamagedStore, NotFound, SaeError
from sae.cache.runs import Run
from sae.cache.store.head import RECIPE, head_bytes
from sae.cache.store.manifest import MANIFEST
from sae.cache.tokens import TokenStore
from sae.cache.upkeep import removing

ROWS = heavy_rows(CHUNK, 5)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def find_tokens(root: Path, name: str | None = None) -> TokenStore:
    return catalogue.find(root, TokenStore, name)


def find_rows(root: Path, name: str | None = None) -> ActivationStore:
    return catalogue.find(root, ActivationStore, name)


def test_a_name_is_a_key_a_beginning_or_a_path(tmp_path: Path) -> None:
    one = write_activations(tmp_path, ROWS, site="mlp_out")
    other = write_activations(tmp_path, ROWS, site="resid_post")
    for name in (one.key, "synthetic-1.mlp", str(one.path), f"{one.path}/"):
        assert find_rows(tmp_path, name).key == one.key
        assert catalogue.any_store(tmp_path, name).key == one.key
    for name in ("synthetic", "synthetic-1."):
        with pytest.raises(SaeError, match=f"activations = .*: ambiguous; matches {one.key}, {other.key}"):
            find_rows(tmp_path, name)
        with pytest.raises(SaeError, match=f"{name}: ambiguous; matches {one.key}, {other.key}"):
            catalogue.any_store(tmp_path, name)
    with pytest.raises(NotFound, match=f"activations = gpt2: no such store in .*; there is {one.key}, {other.key}"):
        find_rows(tmp_path, "gpt2")
    with pytest.raises(NotFound, match=f"gpt2: no such store in .*; there is {one.key}"):
        catalogue.any_store(tmp_path, "gpt2")


def test_a_beginning_means_the_training_store(tmp_path: Path) -> None:
    """And of two codecs the finished one; what is to be removed is never chosen so."""
    train = write_activations(tmp_path, ROWS, codec_text="int8")
    validation = write_activations(tmp_path, ROWS, codec_text="int8", split="validation")
    other = write_activations(tmp_path, ROWS, codec_text="float32")
    with ActivationWriter(tmp_path, other.slug, other.recipe) as writer:
        writer.request(10 * CHUNK)  # and was interrupted
    assert not other.complete
    assert find_rows(tmp_path, "synthetic").key == catalogue.any_store(tmp_path, "synthetic").key == train.key
    assert catalogue.any_store(tmp_path, "synthetic-1.mlp_out-val").key == validation.key
    with pytest.raises(SaeError, match="synthetic: ambiguous") as caught:
        removing.removable(tmp_path, "synthetic")
    assert validation.key not in str(caught.value) and other.key in str(caught.value)


def test_a_path_anywhere_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the cache, relative, or the folder one is in."""
    store = write_activations(tmp_path, ROWS)
    moved = store.path.rename(tmp_path / store.key)
    monkeypatch.chdir(tmp_path)
    for name in (str(moved), moved.name):
        assert isinstance(catalogue.any_store(tmp_path / "nowhere", name), ActivationStore)
        assert find_rows(tmp_path / "nowhere", name).path == moved
    monkeypatch.chdir(moved)
    assert catalogue.any_store(tmp_path / "nowhere", ".").path == moved


def test_a_key_that_begins_another_key(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK)
    store.path.with_name(f"{store.key}-{store.key}").symlink_to(store.path)
    assert find_tokens(tmp_path, store.key).key == store.key
    assert catalogue.any_store(tmp_path, store.key).key == store.key


def test_nothing_yet(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokens: no store yet; run `tokenize\(\)` first"):
        find_tokens(tmp_path)
    with pytest.raises(NotFound, match=r"there is nothing yet; run `tokenize\(\)`"):
        find_tokens(tmp_path, "gpt2")
    with pytest.raises(NotFound, match=r"gpt2: no such store in .*; there is nothing yet"):
        catalogue.any_store(tmp_path, "gpt2")
    assert catalogue.stores(tmp_path) == []
    assert catalogue.latest(tmp_path) == {}


def test_without_a_name_the_training_store(tmp_path: Path) -> None:
    """One of each split: the training store is meant, for tokens and for activations."""
    write_tokens(tmp_path, CHUNK, split="validation")
    train = write_tokens(tmp_path, CHUNK)
    assert find_tokens(tmp_path).key == train.key
    write_activations(tmp_path, ROWS, split="validation")
    rows = write_activations(tmp_path, ROWS)
    assert find_rows(tmp_path).key == rows.key
    other = write_activations(tmp_path, ROWS, site="resid_post")
    with pytest.raises(SaeError, match="ambiguous") as caught:
        find_rows(tmp_path)
    assert str(caught.value) == f"activations = ...: ambiguous; matches {rows.key}, {other.key}"


def test_without_a_name_what_the_last_command_made(tmp_path: Path) -> None:
    one = write_activations(tmp_path, ROWS, site="mlp_out")
    other = write_activations(tmp_path, ROWS, site="resid_post")
    catalogue.remember(tmp_path, "tokens", ["t"])
    catalogue.remember(tmp_path, "activations", [one.key])
    assert find_rows(tmp_path).key == one.key
    catalogue.remember(tmp_path, "activations", [one.key, other.key])
    assert catalogue.latest(tmp_path) == {"tokens": ["t"], "activations": [one.key, other.key]}
    with pytest.raises(SaeError, match="ambiguous"):
        find_rows(tmp_path)
    removing.remove(tmp_path, one.path)
    assert find_rows(tmp_path).key == other.key
    (tmp_path / "latest.json").write_text("[")
    with pytest.raises(DamagedStore, match=r"latest\.json: is not the JSON that was written; remove the file"):
        find_rows(tmp_path)


def test_the_list(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, CHUNK, ended=True)
    rows = write_activations(tmp_path, ROWS)
    entries = [catalogue.entry(store) for store in catalogue.stores(tmp_path)]
    assert [(e.key, e.kind, e.rows, e.complete) for e in entries] == [
        (tokens.key, "tokens", CHUNK, True),
        (rows.key, "activations", CHUNK, True),
    ]
    assert entries[1].bytes == sum(path.stat().st_size for path in rows.path.glob("*/c/**/*") if path.is_file())
    assert entries[1].as_json()["path"] == str(rows.path)


def test_siblings(tmp_path: Path) -> None:
    train = write_activations(tmp_path, ROWS)
    assert catalogue.sibling_of(tmp_path, train, "validation") is None
    write_activations(tmp_path, ROWS, split="validation", seed=1)
    assert catalogue.sibling_of(tmp_path, train, "validation") is None
    validation = write_activations(tmp_path, ROWS, split="validation")
    found = catalogue.sibling_of(tmp_path, train, "validation")
    assert found is not None
    assert found.key == validation.key


def test_a_damaged_store_is_found_and_removed(tmp_path: Path) -> None:
    good, bad = write_tokens(tmp_path, CHUNK), write_activations(tmp_path, ROWS)
    (bad.path / MANIFEST).write_bytes(b"nonsense\n")
    readable, damage = catalogue.readable(tmp_path)
    assert [store.key for store in readable] == [good.key]
    assert [str(bad.path / MANIFEST) in line for line in damage] == [True]
    with pytest.raises(DamagedStore):
        catalogue.any_store(tmp_path, bad.key)
    assert catalogue.located(tmp_path, bad.key[:12]) == bad.path
    assert removing.remove(tmp_path, bad.path) > 0
    assert not bad.path.exists()
    with pytest.raises(SaeError, match="the name of a store is empty"):
        catalogue.located(tmp_path, "")


def test_removal(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK)
    with Lock(store.path), pytest.raises(Busy, match="is writing here"):
        removing.remove(tmp_path, store.path)
    assert store.refreshed().n_rows == CHUNK
    assert removing.remove(tmp_path, store.path) > store.manifest.stored_bytes
    assert not store.path.exists()


def test_a_removal_cut_short_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stopped: no reader finds the store, and the next writer makes it whole again."""
    unlink = os.unlink
    for stop in range(20):
        store = write_tokens(tmp_path, 2 * CHUNK)
        left = stop

        def killed(*args: object, **options: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            unlink(*args, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", killed)
            try:
                removing.remove(tmp_path, store.path)
            except KeyboardInterrupt:
                pass
            else:
                break
        if (store.path / RECIPE).exists():
            assert stop == 0
        remade = write_tokens(tmp_path, 2 * CHUNK)
        for name in remade.committed_files():
            remade.stored(name)
    assert 5 < stop < 19
    assert not (store.path / MANIFEST).exists()


def test_a_store_of_another_kind(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK)
    (store.path / RECIPE).write_bytes(head_bytes("pictures", store.slug, store.recipe))
    with pytest.raises(SaeError, match="holds pictures, of which this version knows nothing"):
        catalogue.any_store(tmp_path, store.key)


def test_runs(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert catalogue.runs(root) == []
    with pytest.raises(NotFound, match=r"no finished run; run `train\(\)` first"):
        catalogue.find_run(root, None)
    with pytest.raises(NotFound, match=re.escape(rf"x: no such run in {root}; there is nothing yet; run `train()`")):
        catalogue.find_run(root, "x")
    seen = {"key": "rows-0a1b2c3d", "rows": 5, "recipe": activation_recipe()}
    made = [Run.create(root / name, {"train": {}, "activations": seen}) for name in ("b", "a", "c")]
    for age, run in enumerate(made):
        os.utime(run.path / "config.json", (age, age))
    for run in made[:2]:
        (run.path / "sae_weights.safetensors").write_bytes(b"")
    (root / "another tool's").mkdir()
    (root / "another tool's" / "config.json").write_text('{"architecture": "standard"}')
    assert [run.name for run in catalogue.runs(root)] == ["b", "a", "c"]
    assert catalogue.find_run(root, None).name == "a"
    assert catalogue.find_run(root, "c").name == "c"
    assert catalogue.find_run(tmp_path, str(root / "b")).name == "b"
    with pytest.raises(NotFound, match=r"x: no such run in .*; there is b, a, c"):
        catalogue.find_run(root, "x")
    (made[2].path / "config.json").write_text('{"train": {}, "activations": {"key": "../x"}}')
    assert [run.name for run in catalogue.readable_runs(root)[0]] == ["b", "a"]
    with pytest.raises(DamagedStore, match=r"c/config\.json: is not what was written \(recipe is missing\)"):
        catalogue.runs(root)
