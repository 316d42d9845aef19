"""Runs and stores to the hub and back, against a server that speaks its protocol: whole, resumed, damaged, refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import done, sae
from support.small_hub import Fault, Hub, hub
from support.small_runs import planted_rows, planted_store, settings
from support.small_stores import shrunk

from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import EVALUATION, WEIGHTS, Run
from sae.pipeline import formats
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.sharing import repository
from sae.pipeline.sharing.pull import pull
from sae.pipeline.sharing.push import push_run, push_store
from sae.pipeline.sharing.repository import expect_inside
from sae.pipeline.train.stage import open_run, train

SAES, ROWS = "me/saes", "me/rows"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ActivationStore, Run]]:
    root = tmp_path_factory.mktemp("here")
    with shrunk():
        store = planted_store(root / "cache", planted_rows(80))
        run = open_run(settings(steps=4, batch=32), Dataset.of(store), root / "runs", "small", resume=False)
        train([run], Dataset.of(store), Silent(), device="cpu")
        run.write_json(EVALUATION, {"fvu": 0.25, "l0": 4.0, "dead_share": None})
        yield store, run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    with hub({}, tmp_path / "hub-cache") as found:
        found.root = tmp_path / "hub"
        yield found


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "README.md"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_run_there_and_back(made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path) -> None:
    _, run = made
    first = push_run(run, SAES, Silent())
    assert first.sent > first.bytes * 0.9 and first.page.endswith("/me/saes/tree/main/small")
    assert push_run(run, SAES, Silent()).sent == 0, "all is there"
    there = served.models[SAES]
    assert formats.detect(there / "small").name == "saelens"
    page = (there / "small/README.md").read_text()
    assert (
        "| FVU | 0.25 |" in page
        and "sae train --config small/config.json --name again" in page
        and '"d_sae": 32' in page
    )
    assert 'SAE.from_pretrained("me/saes", FOLDER)' in (there / "README.md").read_text()
    found = pull(SAES, None, tmp_path / "cache", tmp_path / "runs", Silent(), name="again")
    kept = {name: data for name, data in files(run.path).items() if "checkpoint" not in name}
    assert files(found.path) == kept and Run(found.path).finished and Run(found.path).check() == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["again"]
    with pytest.raises(SaeError, match="again: exists; give the run another `name`"):
        pull(SAES, "small", tmp_path / "cache", tmp_path / "runs", Silent(), name="again")


def test_a_store_there_and_back(
    made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several commits, and what is needed to read it comes last."""
    store, _ = made
    monkeypatch.setattr(repository, "FILES", 3)
    push_store(store, ROWS, Silent())
    commits = [line for line in served.asked if "/commit/" in line]
    assert len(commits) > 3 and all("/api/datasets/me/rows/" in line for line in commits)
    found = pull(ROWS, store.key, tmp_path / "cache", tmp_path / "runs", Silent())
    ours = {name: data for name, data in files(store.path).items() if name not in ("request.json", "hints.json")}
    assert found.path == tmp_path / "cache" / "activations" / store.key and files(found.path) == ours
    again = ActivationStore(found.path)
    assert again.n_rows == store.n_rows and (again.rows(0, 50) == store.rows(0, 50)).all()
    assert pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent()).bytes == 0, "it is here"


def test_what_was_interrupted_goes_on(
    made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = made
    monkeypatch.setattr(repository, "FILES", 3)
    served.faults.append(Fault("/commit/", status=500, times=0))
    served.faults[0].times = 1
    with pytest.raises(SaeError, match="me/rows"):
        push_store(store, ROWS, Silent())
    assert "recipe.json" not in {path.name for path in served.models[ROWS].rglob("*")}
    with pytest.raises(NotFound, match="holds no run and no store of ours"):
        pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent())
    push_store(store, ROWS, Silent())
    served.faults.append(Fault("/resolve/", status=403, times=1))
    with pytest.raises(SaeError, match="me/rows"):
        pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent())
    assert not (tmp_path / "cache/activations" / store.key).exists()
    there = {path.name for path in (tmp_path / "cache/activations").rglob("*") if path.is_file()}
    before = len(served.asked)
    found = pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent())
    fetched = [line for line in served.asked[before:] if line.startswith("GET") and "/resolve/" in line]
    assert found.path.exists() and len(there) > 1
    assert len(fetched) < len(files(store.path)), "what was here is not fetched again"


def test_damage_is_told_on_both_ways(made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path) -> None:
    store, run = made
    push_run(run, SAES, Silent())
    push_store(store, ROWS, Silent())
    weights = served.models[SAES] / "small" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"me/saes/small: .*nothing was kept"):
        pull(SAES, None, tmp_path / "cache", tmp_path / "runs", Silent())
    assert [*(tmp_path / "runs").iterdir()] == []
    chunk = served.models[ROWS] / "activations" / store.key / "rows/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[-5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"rows/c/0/0: damaged.*nothing was kept"):
        pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent())
    assert not (tmp_path / "cache/activations" / store.key).exists()
    ours = planted_store(tmp_path / "mine", planted_rows(80))
    (ours.path / "rows/c/1/0").write_bytes(b"no")
    with pytest.raises(DamagedStore, match="rows/c/1/0"):
        push_store(ours, ROWS, Silent())


def test_another_store_under_its_name(made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path) -> None:
    store, _ = made
    push_store(store, ROWS, Silent())
    folder = served.models[ROWS] / "activations"
    (folder / store.key).rename(folder / "other-01234567")
    with pytest.raises(DamagedStore, match="other-01234567"):
        pull(ROWS, None, tmp_path / "cache", tmp_path / "runs", Silent())


def test_what_is_refused(
    made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = made
    where = (tmp_path / "cache", tmp_path / "runs", Silent())
    with pytest.raises(NotFound, match="me/nothing: the hub has no such model"):
        pull("me/nothing", None, *where)
    push_run(run, SAES, Silent())
    with pytest.raises(NotFound, match="me/saes: holds no other; name one of small"):
        pull(SAES, "other", *where)
    with pytest.raises(SaeError, match="offline was asked for"):
        push_run(run, SAES, Silent(), offline=True)
    begun = open_run(settings(steps=5, batch=32), Dataset.of(store), tmp_path / "begun", "begun", resume=False)
    with pytest.raises(NotFound, match="training has not finished"):
        push_run(begun, SAES, Silent())
    for path in ("small/../../x", "other/x", "small\\x"):
        with pytest.raises(SaeError, match="leads out of its folder"):
            expect_inside(path, "small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SaeError, match=r"me/saes: http://127.0.0.1:9 cannot be reached"):
        pull(SAES, None, *where)


def test_by_the_command_line(made: tuple[ActivationStore, Run], served: Hub, tmp_path: Path) -> None:
    store, run = made
    places = ("--cache", store.path.parents[1], "--runs", run.path.parent)
    assert "files" in done("push", "small", SAES, *places).out
    assert done("push", store.key[:9], ROWS, "--json", *places).json["path"] == f"activations/{store.key}"
    mine = ("--cache", tmp_path / "c", "--runs", tmp_path / "r")
    assert done("pull", SAES, "--json", *mine).json["path"].endswith("r/small")
    assert "every byte as it was pushed" in done("pull", ROWS, *mine).out
    assert sae("push", "nothing", SAES, *places).code == 2
