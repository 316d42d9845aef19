"""A source that is added from here, in one class, is seen everywhere; and what is promised of every source."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from support.command_line import done, sae
from support.small_cluster import small_cluster
from support.small_stores import CHUNK, files, shrunk
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.runs import Run
from sae.configs.base import Amount
from sae.pipeline.harvest import keeping
from sae.pipeline.harvest.sources import (
    SOURCES,
    Rows,
    RowSource,
    SourceConfig,
    Stream,
    Supply,
    WindowTask,
    register,
    source_of,
)
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig, SyntheticSource
from sae.pipeline.harvest.sources.table import TableConfig, TableSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent


class WavesConfig(SourceConfig):
    """Which waves."""

    source: Literal["waves"] = Field("waves", description="where rows come from")
    length: int = Field(200, ge=1, description="rows of each split")
    d: int = Field(6, ge=1, description="width of a row")


class Waves(RowSource):
    """Sines of every length, and their squares: two streams that align.

    More than the first sentence is not help.
    """

    name: ClassVar[str] = "waves"
    settings: ClassVar[type[SourceConfig]] = WavesConfig
    config: WavesConfig
    several = True

    def __init__(self, config: WavesConfig) -> None:
        self.config, self.splits = config, ("train", "validation")
        self.streams = (Stream("sines", config.d, torch.eye(config.d)), Stream("squares", config.d))

    @classmethod
    def of_settings(cls, config: WavesConfig, origins: Origins, progress: Progress) -> "Waves":
        return cls(config)

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "Waves":
        found = cls(WavesConfig(length=store.recipe["source"]["length"], d=store.d))
        found.streams = tuple(one for one in found.streams if one.name == store.recipe["stream"])
        return found

    def slug(self, stream: Stream, split: str) -> str:
        return f"{stream.name}-{split}"

    def identity(self) -> Recipe:
        return {"length": self.config.length}

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        starts = ActivationStore.layout({}).start
        return Supply(self.config.length, self.config.length, lambda window: (starts(window),), ended=True)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        for low in range(task.start[0], task.start[0] + task.rows, 10):
            position = np.arange(low, min(low + 10, task.start[0] + task.rows))
            yield Rows(position, partial(self._values, task.split, position))

    def _values(self, split: str, position: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        at = torch.from_numpy(position)[:, None] + (0.5 if split == "validation" else 0.0)
        sines = torch.sin(at / torch.arange(1, self.config.d + 1)).float()
        for name in names:
            yield name, sines if name == "sines" else sines**2

    def elsewhere(self) -> Callable[[], RowSource]:
        return partial(Waves, self.config)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Waves)
    with shrunk():
        yield
    del SOURCES[Waves.name]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


MAKE = "harvest --source waves --set harvest.length=200 --codec float32 --threads 1"


def test_it_is_listed_with_its_settings(home: Path) -> None:
    listed = {one["name"]: one["help"] for one in done("list --json").json["row_sources"]}
    assert listed["waves"] == "Sines of every length, and their squares: two streams that align"
    assert {"language_model", "memory", "synthetic", "table"} < set(listed) and all(listed.values())
    assert "waves" in done("list").out
    settings = {one["name"]: one for one in done("list --settings --json").json["settings"]}
    assert settings["harvest.length"]["default"] == "200"


def test_it_is_harvested_trained_on_judged_and_mended(home: Path) -> None:
    planned = done(f"{MAKE} --dry-run --json").json["plans"]
    assert [(plan["split"], plan["rows"], plan["streams"]) for plan in planned] == [
        (split, 200, ["sines", "squares"]) for split in ("train", "validation")
    ]
    assert not (home / "cache" / "activations").exists()
    made = done(f"{MAKE} --json").json["stores"]
    assert [(one["slug"], one["rows"], one["width"]) for one in made] == [
        (f"{name}-{split}-float32", 200, 6) for split in ("train", "validation") for name in ("sines", "squares")
    ]
    assert "nothing to do" in done(MAKE).err
    stores = {one["slug"]: ActivationStore(Path(one["path"])) for one in made}
    sines, squares = stores["sines-train-float32"], stores["squares-train-float32"]
    positions = sines.positions(0, 200)
    assert sorted(positions) == list(range(200)) and list(positions) == list(squares.positions(0, 200))
    expected = torch.sin(torch.from_numpy(positions)[:, None] / torch.arange(1, 7)).float()
    assert torch.equal(sines.rows(0, 200), expected) and torch.equal(squares.rows(0, 200), expected**2)
    assert sines.closed and sines.truth is not None and squares.truth is None

    small = "--d-sae 8 --k 2 --steps 5 --batch 64 --device cpu --threads 1"
    done(f"train {small} --activations {sines.key} --name waves")
    judged = done("eval waves --json --device cpu --set eval.dead_rows=0").json
    assert judged["rows"] == 200 and judged["hungarian"] is not None and judged["fvu"] > 0
    assert [row["run"] for row in done("compare --json").json["runs"]] == ["waves"]
    assert json.loads((home / "runs/waves/cfg.json").read_text())["metadata"]["dataset_path"] == "waves"
    assert Run(home / "runs/waves").finished

    whole = {store.key: files(store.path) for store in stores.values()}
    for name in ("rows/c/0/0", "position/c/1", "truth/c/0/0"):
        (sines.path / name).unlink()
    (squares.path / "rows/c/6/0").write_bytes(b"other")
    assert sae("cache verify").code == 3
    done("cache verify --repair")
    assert {store.key: files(store.path) for store in stores.values()} == whole


def test_a_lost_line_is_made_again(home: Path) -> None:
    done(MAKE)
    (path,) = (home / "cache" / "activations").glob("sines-train-*")
    whole = files(path)
    lines = (path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(len(lines) - 1):
        (path / "manifest.jsonl").write_bytes(b"".join([*lines[:number], b"{}\n", *lines[number + 1 :]]))
        done("cache verify --repair")
        assert files(path) == whole, number


def test_an_unfinished_window_is_kept_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    harvest(Waves(WavesConfig()), tmp_path / "whole", Silent())
    computed: list[tuple[str, int]] = []
    values = Waves._values

    def counted(self: Waves, split: str, position: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        if len(computed) == 9:
            raise KeyboardInterrupt
        computed.append((split, int(position[0])))
        return values(self, split, position, names)

    with monkeypatch.context() as patch:
        patch.setattr(Waves, "_values", counted)
        with pytest.raises(KeyboardInterrupt):
            harvest(Waves(WavesConfig()), tmp_path / "cut", Silent())
        first, computed[:] = list(computed), []
        patch.setattr(Waves, "_values", lambda *args: computed.append((args[1], int(args[2][0]))) or values(*args))  # type: ignore[func-returns-value]
        harvest(Waves(WavesConfig()), tmp_path / "cut", Silent())
    assert len(first) == 9 and not set(first) & set(computed)
    for whole, cut in zip(catalogue.stores(tmp_path / "whole"), catalogue.stores(tmp_path / "cut"), strict=True):
        assert files(whole.path) == files(cut.path)


def table(folder: Path) -> RowSource:
    np.save(folder / "some.npy", np.random.default_rng(0).normal(size=(300, 5)))
    return TableSource.of_settings(TableConfig(table=str(folder / "some.npy")), Origins(folder), Silent())


@pytest.mark.slow
def test_by_workers_every_source_gives_the_same(tmp_path: Path) -> None:
    every: tuple[RowSource, ...] = (
        Waves(WavesConfig()),
        SyntheticSource(SyntheticConfig(d=6, rows=200, validation_rows=1)),
        table(tmp_path),
    )
    with small_cluster() as scheduler:
        for source in every:
            harvest(source, tmp_path / "alone", Silent())
            harvest(source, tmp_path / "together", Silent(), scheduler=scheduler)
    alone, together = (catalogue.stores(tmp_path / name) for name in ("alone", "together"))
    assert {store.key: files(store.path) for store in alone} == {store.key: files(store.path) for store in together}


def test_what_cannot_be(home: Path) -> None:
    for command, message in {
        "harvest --source 7": "--source 7: unknown source; there are language_model",
        "harvest --source wave": "--source wave: unknown source; did you mean 'waves'?",
        f"{MAKE} --layer 3": "--layer 3: these settings have no layer",
        "harvest --source waves --set harvest.length=0": "harvest.length = 0: input should be greater",
        f"{MAKE} --tokens-from x": "--tokens-from x: ",
        "harvest --source memory": "harvest.source = memory: rows in memory are a program's",
        f"{MAKE} --codec int4": "--codec int4: no such codec",
    }.items():
        answer = sae(command)
        assert (answer.code, message in answer.complaint) == (2, True), (command, answer.err)
    assert not (home / "cache" / "activations").exists()


def test_a_preset_of_a_language_model_says_nothing_of_another_source(home: Path) -> None:
    assert len(done(f"{MAKE} --preset gpt2 --json").json["stores"]) == 4
    (home / "mine.yaml").write_text("harvest: {source: waves, length: 40}\n")
    made = done("harvest --config mine.yaml --threads 1 --json").json["stores"]
    assert {one["rows"] for one in made} == {40} and all(one["slug"].endswith("-int8") for one in made)


def test_a_store_of_an_unknown_source_says_so(tmp_path: Path) -> None:
    harvest(Waves(WavesConfig()), tmp_path, Silent())
    store = catalogue.stores(tmp_path)[0]
    assert isinstance(store, ActivationStore)
    del SOURCES[Waves.name]
    with pytest.raises(SaeError, match="source waves: unknown to this version; use the one that wrote the store"):
        source_of(store, Origins(tmp_path))
    register(Waves)


def test_every_source_says_what_it_is() -> None:
    for kind in SOURCES.values():
        assert kind.settings.model_fields["source"].default == kind.name
        assert (inspect.getdoc(kind) or "").splitlines()[0]
        assert kind.settings.model_fields["codec"].description
    assert CHUNK  # the windows here are small
