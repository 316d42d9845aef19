"""Worker processes change nothing but the time: the same files, whoever computed them and whoever died doing so."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import sae
from support.harvesting import harvest
from support.killing import Killed
from support.slowly import reciprocal, slowly_squared
from support.small_cluster import Dying, small_cluster
from support.small_models import CONTEXT, made_up, save_model, small_stages, token_store
from support.small_stores import files

from sae.cache.errors import Busy, SaeError
from sae.cache.tokens import SPLITS, TokenStore
from sae.cache.upkeep import removing
from sae.pipeline.harvest import keeping, windows
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.harvest.stage import HarvestResult
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.parallel import dask_cluster
from sae.pipeline.parallel.process_pool import Pool
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize import encoding
from sae.pipeline.tokenize import stage as tokenize_stage
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Small windows, and patience with a scheduler on a machine that is busy."""
    with small_stages(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dask_cluster, "PATIENCE", 60)
        yield


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in which every file is the death of a worker: in the middle of a window, or of a piece of text."""
    return {name: tmp_path_factory.mktemp(name) for name in ("window", "piece")}


@pytest.fixture(scope="module")
def scheduler(deaths: dict[str, Path]) -> Iterator[str]:
    in_window = Dying("sae.pipeline.language_model", "LanguageModel", "activations", deaths["window"])
    in_piece = Dying("sae.pipeline.tokenizers.tokenizer", "TiktokenTokenizer", "encode_batch", deaths["piece"])
    with small_cluster(in_window, in_piece) as address:
        yield address


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


def run(folder: Path, root: Path, *stores: TokenStore, tokens: Any = "all", **options: Any) -> HarvestResult:
    config = HarvestConfig(
        model=str(folder), layer=(0, 1), site=("mlp_out", "resid_post"), batch_tokens=5 * CONTEXT, tokens=tokens,
        validation_tokens="all",
    )  # fmt: skip
    return harvest(config, list(stores), root, options.pop("progress", Silent()), **options)


def everything(root: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: files(path) for path in sorted((root / "activations").glob("*"))}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows = 0

    def note(self, line: str) -> None:
        self.lines.append(line)

    def advance(self, n: int, **_: object) -> None:
        self.rows += n


@pytest.mark.slow
def test_a_harvest_by_workers_equals_one_alone(tmp_path: Path, gpt2: Path, scheduler: str) -> None:
    """File by file: two splits, four stores each; first a part, then the whole, one store of which is further."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for root, options in ((alone, {}), (together, {"scheduler": scheduler})):
        tokens = token_store(root, made_up(70))
        validation = token_store(root, made_up(20, seed=1), split="validation")
        notes = Notes()
        result = run(gpt2, root, tokens, validation, progress=notes, **options)
        assert notes.rows == sum(plan.rows for plan in result.plans)
        assert all(store.closed for stores in result.stores.values() for store in stores)
    assert any("2 workers; dashboard: " in line for line in notes.lines)
    assert everything(together) == everything(alone)
    assert len(everything(alone)) == 8


def test_tokens_that_workers_read_are_not_removed(tmp_path: Path, gpt2: Path, scheduler: str) -> None:
    """Those of the second split, too, while the first is computed."""
    tokens = [token_store(tmp_path, made_up(20, seed=seed), split=SPLITS[seed]) for seed in (0, 1)]

    class Removing(Notes):
        tries = 0

        def advance(self, n: int, **_: object) -> None:
            for store in tokens:
                with pytest.raises(Busy, match=r"another process is reading it|a living process is writing"):
                    removing.remove(tmp_path, store.path)
                self.tries += 1

    progress = Removing()
    result = run(gpt2, tmp_path, *tokens, progress=progress, scheduler=scheduler)
    assert progress.tries >= 4 and all(store.closed for stores in result.stores.values() for store in stores)
    removing.remove(tmp_path, tokens[0].path)


def test_workers_take_up_what_was_kept_of_a_window(
    tmp_path: Path, gpt2: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this process, killed at its eighth batch: the files are those of a harvest that nobody interrupted."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(gpt2, alone, token_store(alone, made_up(30)))
    tokens = token_store(together, made_up(30))
    activate, calls = LanguageModel.activations, itertools.count()

    def killed(*args: Any) -> Any:
        if next(calls) == 7:
            raise Killed
        return activate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "EVERY", 0.0)
        patch.setattr(LanguageModel, "activations", killed)
        with pytest.raises(Killed):
            run(gpt2, together, tokens)
    assert len(list(together.rglob("under-way-*"))) >= 4
    run(gpt2, together, tokens, scheduler=scheduler)
    assert everything(together) == everything(alone) and not list(together.rglob("under-way-*"))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_window(
    tmp_path: Path, gpt2: Path, scheduler: str, deaths: dict[str, Path]
) -> None:
    """Its window is given out again, the files are the same, and nothing half written is left."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(gpt2, alone, token_store(alone, made_up(200)))
    (deaths["window"] / "once").touch()
    run(gpt2, together, token_store(together, made_up(200)), scheduler=scheduler)
    assert not list(deaths["window"].glob("*"))
    assert everything(together) == everything(alone)


@pytest.mark.slow
def test_a_worker_that_keeps_dying(tmp_path: Path, gpt2: Path, scheduler: str, deaths: dict[str, Path]) -> None:
    """One line; what was committed stays, and the next harvest goes on from there."""
    tokens = token_store(tmp_path, made_up(30))
    assert run(gpt2, tmp_path, tokens, tokens=25 * CONTEXT).plans[0].rows == 384
    always = deaths["window"] / "always"
    always.touch()
    with pytest.raises(SaeError, match=r"^scheduler = tcp\S+: window \d+: a worker died at it every time") as caught:
        run(gpt2, tmp_path, tokens, scheduler=scheduler)
    always.unlink()
    assert "\n" not in str(caught.value)
    run(gpt2, tmp_path, tokens, scheduler=scheduler)
    run(gpt2, tmp_path / "alone", token_store(tmp_path / "alone", made_up(30)))
    assert everything(tmp_path) == everything(tmp_path / "alone")


def test_what_a_worker_cannot_do_is_said_in_one_line(tmp_path: Path, gpt2: Path, scheduler: str) -> None:
    tokens = token_store(tmp_path, made_up(20))
    here = tmp_path / "gpt2"
    shutil.copytree(gpt2, here)
    model = LanguageModel.boot(str(here))
    model.recipe()
    shutil.rmtree(here)  # as where a worker's machine does not have it
    with pytest.raises(
        SaeError, match=r"^a worker on \S+ cannot load the model: model = .*gpt2: no such folder"
    ) as caught:
        run(here, tmp_path, tokens, scheduler=scheduler, model=model)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "activations").glob("*/rows"))


@pytest.mark.slow
def test_workers_that_do_not_see_the_cache(tmp_path: Path, scheduler: str) -> None:
    with dask_cluster.connected(1, scheduler, Silent()) as there:
        assert there is not None
        seen = tmp_path / "seen"
        seen.touch()
        assert list(there.everywhere(windows.expect_lease, seen).values()) == [None, None]
        with pytest.raises(
            SaeError, match=r"^a worker on \S+ does not see .*/store; give all workers the file system of"
        ):
            there.everywhere(windows.expect_lease, tmp_path / "store" / "lease")


def test_workers_without_this_program(scheduler: str) -> None:
    with dask_cluster.connected(1, scheduler, Silent()) as there:
        assert there is not None
        with pytest.raises(
            SaeError, match=r"its workers cannot run this program \(No module named 'nowhere'\); install"
        ):
            there.everywhere(importing, "nowhere")


def importing(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize(
    ("address", "why"), [("tcp://127.0.0.1:1", "Timed out"), ("nonsense", "missing port"), ("ftp://a:1", "unknown")]
)
def test_a_scheduler_that_is_not_there(address: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "PATIENCE", 1)
    with (
        pytest.raises(SaeError, match=rf"^scheduler = {address}: no scheduler answers there \(.*{why}") as caught,
        dask_cluster.connected(1, address, Silent()),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_workers_of_other_versions(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "versions", versions_of_tomorrow)
    with (
        pytest.raises(SaeError, match=r"tcp://\S+ has torch 2\S*, here it is 9\.9; install the same versions"),
        dask_cluster.connected(1, scheduler, Silent()),
    ):
        pass


VERSIONS = dask_cluster.versions


def versions_of_tomorrow() -> dict[str, str]:
    return {**VERSIONS(), "torch": "9.9"}


def test_results_come_in_order_and_few_are_under_way(scheduler: str) -> None:
    """Tasks are taken from their source no earlier than `ahead` allows, and errors wait for their turn."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with dask_cluster.connected(1, scheduler, Silent()) as there:
        assert there is not None
        for turn, (task, result) in enumerate(there.ordered(slowly_squared, source(), lambda size: size + 1, str)):
            assert (task, result) == (turn, turn * turn)
            assert len(taken) <= turn + 3
        assert turn == 19
        inverses = there.ordered(reciprocal, [4, 2, 1, 0, 5], lambda _: 5, str)
        assert list(itertools.islice(inverses, 3)) == [(4, 0.25), (2, 0.5), (1, 1.0)]
        with pytest.raises(ZeroDivisionError):
            next(inverses)


def test_a_process_of_a_pool_that_dies() -> None:
    with Pool(2) as pool:
        squares = pool.ordered(slowly_squared, range(7), lambda size: size + 1, str)
        assert list(squares) == [(n, n * n) for n in range(7)]
        with pytest.raises(SaeError, match=r"^workers = 2: one of them died; if memory ran out ask for fewer"):
            list(pool.ordered(os._exit, [1, 2], lambda _: 2, str))


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_by_workers_equal_tokens_alone(
    tmp_path: Path, scheduler: str, deaths: dict[str, Path], killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(tokenize_stage, "BLOCK_DOCUMENTS", 20)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {n}. " + "Some words follow. " * (n % 7)}) + "\n" for n in range(300))
    )
    config = TokenizeConfig(
        source=str(tmp_path / "texts.jsonl"), tokenizer="tiny", context=8, tokens="all", validation_tokens="all",
        validation=0.2,
    )  # fmt: skip
    alone = tokenize(config, tmp_path / "alone", Silent()).stores
    if killed:
        (deaths["piece"] / "1").touch()
    together = tokenize(config, tmp_path / "together", Silent(), scheduler=scheduler).stores
    assert not list(deaths["piece"].glob("*"))
    for split, store in alone.items():
        assert store.n_contexts > 100
        assert files(together[split].path) == files(store.path)


@pytest.mark.slow
def test_the_commands_with_workers(tmp_path: Path) -> None:
    """`--workers 2` and `--workers 1`, as they are typed, with windows of their real size."""
    words = np.random.default_rng(0).integers(0, 900, 30_000).astype(str)
    lines = [json.dumps({"text": " ".join(words[start : start + 40])}) for start in range(0, len(words), 40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    for workers in ("1", "2"):
        for command in (
            f"tokenize --source {tmp_path}/texts.jsonl --tokenizer tiny --tokens all --validation 0",
            "harvest --model tiny --layer 1,2 --site mlp_out --set harvest.batch_tokens=1024",
        ):
            typed = [*command.split(), "--workers", workers, "--cache", str(tmp_path / workers)]
            done = subprocess.run(
                [sys.executable, "-m", "sae.cli", *typed], cwd=PROJECT, capture_output=True, text=True, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            dask = workers == "2" and command.startswith("harvest")
            assert ("2 workers; dashboard: http://127.0.0.1:" in done.stderr) == dask, done.stderr
            assert "Traceback" not in done.stderr
    found = [{p.name: files(p) for p in sorted((tmp_path / w).glob("*/*-*"))} for w in ("1", "2")]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert sum(name.startswith("rows/c/") for name in next(iter(found[0].values()))) >= 3


def test_workers_or_a_scheduler() -> None:
    answer = sae("harvest --workers 2 --scheduler tcp://127.0.0.1:1")
    assert (answer.code, answer.complaint) == (
        2, "--workers 2: a scheduler brings its own workers; give --workers or --scheduler",
    )  # fmt: skip


def environment(name: str) -> str | None:
    return os.environ.get(name)


@pytest.mark.slow
def test_workers_here_keep_the_memory_they_need_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """dask would have glibc give it back after every pass."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with dask_cluster.connected(2, None, Silent()) as there:
        assert there is not None and there.size == 2
        assert list(there.everywhere(environment, "MALLOC_TRIM_THRESHOLD_").values()) == [None, None]
        assert list(there.everywhere(environment, "OMP_NUM_THREADS").values()) != [None, None]
