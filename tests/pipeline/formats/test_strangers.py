"""Whatever is wrong with a file of another tool is one line, whichever tool: nothing is run, nothing breaks."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hostile import RAW, VALUES
from support.saes_kit import one_thread
from support.small_formats import Folder, Tensors, every, one_line, put_tensors, rows

from sae.cache.errors import SaeError
from sae.pipeline import formats
from sae.pipeline.formats.archives import read_npz, read_pt

single = pytest.fixture(autouse=True, scope="module")(one_thread)
EVERY = every()
SPOILT: dict[str, Callable[[Tensors, str], Tensors]] = {
    "lacks one": lambda t, name: {key: value for key, value in t.items() if key != name},
    "has one more": lambda t, name: t | {"more": torch.zeros(3)},
    "is one dimension more": lambda t, name: t | {name: t[name].unsqueeze(0)},
    "is flat": lambda t, name: t | {name: t[name].reshape(-1, 1)},
    "has no numbers": lambda t, name: t | {name: torch.zeros(0)},
    "is whole numbers": lambda t, name: t | {name: torch.ones(t[name].shape, dtype=torch.int64)},
    "is complex": lambda t, name: t | {name: torch.ones(t[name].shape, dtype=torch.complex64)},
    "is true and false": lambda t, name: t | {name: torch.ones(t[name].shape, dtype=torch.bool)},
    "is NaN": lambda t, name: t | {name: torch.full(t[name].shape, float("nan"))},
    "is infinite": lambda t, name: t | {name: torch.full(t[name].shape, float("inf"))},
    "is too large": lambda t, name: t | {name: torch.full(t[name].shape, 1e300, dtype=torch.float64)},
}


@pytest.mark.parametrize("tool", EVERY)
def test_tensors_that_are_none(tool: str, tmp_path: Path) -> None:
    folder = EVERY[tool]
    where = folder.put(tmp_path)
    optional = {"affine_skip_connection"}
    unread = {"k", "group_sizes"} | ({"threshold"} if tool.endswith("AutoEncoderTopK") else set())
    for name in folder.tensors:
        for spoil in SPOILT.values():
            put_tensors(where / folder.tensors_file, spoil(folder.tensors, name))
            if spoil is SPOILT["lacks one"] and name in optional:
                assert _read_or_refused(where)
            elif name in unread:  # whatever they are
                assert _read_or_refused(where) or spoil is SPOILT["has one more"] or name == "k"
            else:
                one_line(lambda: formats.read(where))


def _read_or_refused(where: Path) -> bool:
    """Whether a folder is read, as finite numbers, or else refused in one line."""
    try:
        found = formats.read(where).dictionary
    except SaeError:
        one_line(lambda: formats.read(where))
        return False
    assert found(rows(2)).isfinite().all()
    return True


@pytest.mark.parametrize("tool", [name for name, folder in EVERY.items() if folder.odd])
def test_whatever_a_setting_says_is_read_or_refused(tool: str, tmp_path: Path) -> None:
    folder = EVERY[tool]
    where = folder.put(tmp_path)
    outcomes = []
    for keys in folder.odd:
        for value in [*VALUES, ...]:
            said: Any = json.loads(json.dumps(folder.said))
            inside = said
            for key in keys[:-1]:
                inside = inside[key]
            inside.pop(keys[-1], None) if value is ... else inside.__setitem__(keys[-1], value)
            (where / folder.settings_file).write_text(json.dumps(said))
            outcomes.append(_read_or_refused(where))
    assert not all(outcomes)


def _file(kind: str) -> tuple[Folder, str]:
    return {
        "ae.pt": (EVERY["dictionary_learning AutoEncoder"], "ae.pt"),
        "config.json": (EVERY["dictionary_learning AutoEncoder"], "config.json"),
        "params.npz": (EVERY["gemma-scope npz"], "params.npz"),
        "params.safetensors": (EVERY["gemma-scope second"], "params.safetensors"),
        "layer5.sae.pt": (EVERY["qwen-scope"], "layer5.sae.pt"),
        "sae_weights.safetensors": (EVERY["openmoss relu"], "sae_weights.safetensors"),
    }[kind]


FILES = ["ae.pt", "config.json", "params.npz", "params.safetensors", "layer5.sae.pt", "sae_weights.safetensors"]


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_something_else(kind: str, tmp_path: Path) -> None:
    folder, name = _file(kind)
    where = folder.put(tmp_path)
    for data in RAW.values():
        (where / name).write_bytes(data)
        assert str(where) in one_line(lambda: formats.read(where))


@pytest.mark.parametrize("kind", [name for name in FILES if name != "config.json"])
def test_cut_and_changed_files(kind: str, tmp_path: Path) -> None:
    """Cut anywhere it is refused; with a byte changed it is refused, or other numbers of the same dictionary."""
    folder, name = _file(kind)
    where = folder.put(tmp_path)
    whole = (where / name).read_bytes()
    draw = random.Random(5)
    for at in [0, 1, 4, 8, *(draw.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
        (where / name).write_bytes(whole[:at])
        one_line(lambda: formats.read(where))
    for _ in range(60):
        at = draw.randrange(len(whole))
        (where / name).write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        try:
            formats.read(where)
        except SaeError:
            one_line(lambda: formats.read(where))


class Runs:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ae.pt", "layer5.sae.pt"])
def test_nothing_but_weights_is_unpickled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, name = _file(kind)
    where = folder.put(tmp_path)
    for written in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        for what in (Runs(), {"encoder.weight": Runs()}, {**folder.tensors, "x": Runs()}):
            written(what, where / name)
            assert "holds more than weights, or is damaged; nothing else is" in one_line(lambda: formats.read(where))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ([torch.zeros(2)], "holds no tensors by name, but a list"),
        (torch.zeros(2), "holds no tensors by name, but a Tensor"),
        ({3: torch.zeros(2)}, "holds no tensors by name"),
        ({"a": {"b": torch.zeros(2)}}, "a is not a plain tensor"),
        ({"a": 3}, "a is not a plain tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is not a plain tensor"),
        ({"a": torch.zeros(2, device="meta")}, "a is not a plain tensor"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_weights_of_other_kinds(what: object, said: str, tmp_path: Path) -> None:
    torch.save(what, tmp_path / "ae.pt")
    assert said in one_line(lambda: read_pt(tmp_path / "ae.pt"))


def test_a_few_bytes_that_say_more_numbers_than_there_is_memory(tmp_path: Path) -> None:
    folder = EVERY["dictionary_learning AutoEncoder"]
    where = folder.put(tmp_path)
    large = torch.zeros(1).expand(10**6, 10**6)
    torch.save(folder.tensors | {"encoder.weight": large}, where / "ae.pt")
    assert "more than the memory of this machine" in one_line(lambda: formats.read(where))


def test_an_archive_that_unpacks_to_more_than_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reads in (("a.npz", read_npz), ("a.pt", read_pt)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("W_enc.npy", b"\0" * 10**6)
        with monkeypatch.context() as patch:
            patch.setattr("sae.pipeline.formats.files.memory", lambda: 10**5)
            assert "more than the memory" in one_line(lambda: reads(tmp_path / name))  # noqa: B023


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([None]), np.zeros(2, "c16"), np.zeros(2, [("a", "f4")]), np.zeros(2, "M8[s]")],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_other_kinds(array: np.ndarray, tmp_path: Path) -> None:
    folder = EVERY["gemma-scope npz"]
    where = folder.put(tmp_path)
    np.savez(where / "params.npz", **({name: t.numpy() for name, t in folder.tensors.items()} | {"b_dec": array}))
    one_line(lambda: formats.read(where))


def test_numbers_of_another_byte_order_are_numbers(tmp_path: Path) -> None:
    folder = EVERY["gemma-scope npz"]
    where = folder.put(tmp_path)
    np.savez(where / "params.npz", **{name: t.numpy().astype(">f4") for name, t in folder.tensors.items()})
    folder.expect(formats.read(where).dictionary)
