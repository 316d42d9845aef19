"""A cache and a run folder may come from anyone: whatever their files say, the answer is a result or one line."""

import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command_line import sae
from support.hostile import Lie, honest_home, lies
from support.small_models import small_stages

from sae.cache import catalogue, tokens
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.loader import Loader
from sae.cache.runs import STATISTICS, Run
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.cache.upkeep import garbage, usage
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.pipeline.commands import bars
from sae.pipeline.formats import trained
from sae.pipeline.language_model import hints
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.report.compare import compare
from sae.pipeline.report.page import page, read
from sae.pipeline.train.config import settings_of

FEW = 120  # lies of the default suite
COMMANDS = (
    "cache ls", "cache verify", "cache du", "cache gc", "cache inspect {a} --shuffle-quality", "cache inspect {t}",
    "cache export {a} out --with-tokens --order token", "list", "compare", "report one --device cpu",
    "harvest --model model --layer 1 --site mlp_out --tokens-from {t} --set harvest.batch_tokens=80 --codec float32",
    "train --d-sae 32 --k 4 --batch 16 --steps 2 --name new --activations {a} --device cpu",
    "eval one --device cpu --offline", "train --resume --name one --device cpu", "cache verify --repair --offline",
    "cache rm {a} --yes",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with small_stages() as patch:
        patch.setattr(tokens, "CHUNK_TOKENS", 64)
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        yield


@pytest.fixture(scope="module")
def home(small: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An honest home, inside of which the tests run; `kept` beside it is a copy."""
    made = tmp_path_factory.mktemp("hostile") / "home"
    made.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("SAE_CACHE", str(made / "cache"))
        patch.setenv("SAE_RUNS", str(made / "runs"))
        honest_home(made)
        for part in ("cache", "runs"):
            shutil.copytree(made / part, made.parent / "kept" / part)
        yield made


@contextmanager
def told(home: Path, lie: Lie) -> Iterator[None]:
    """The home with a lie in it."""
    try:
        lie.tell(home)
        yield
    finally:
        shutil.rmtree(home / "out", ignore_errors=True)
        for part in ("cache", "runs"):
            restore(home.parent / "kept" / part, home / part)


def restore(kept: Path, now: Path) -> None:
    """Make a path again what is kept of it, and write nothing that is as it was."""
    if kept.is_dir() and now.is_dir() and not now.is_symlink():
        names = set(os.listdir(kept))
        for name in set(os.listdir(now)) - names:
            remove(now / name)
        for name in names:
            restore(kept / name, now / name)
        return
    was, known = kept.lstat(), now.lstat() if os.path.lexists(now) else None
    if known is None or (was.st_mode, was.st_size, was.st_mtime_ns) != (
        known.st_mode,
        known.st_size,
        known.st_mtime_ns,
    ):
        remove(now)
        shutil.copytree(kept, now) if kept.is_dir() else shutil.copy2(kept, now)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_mode, found.st_size, found.st_mtime_ns


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


opened: list[str] = []  # paths outside of the cache and the runs that something opened, while `watching`
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
        path = os.fspath(arguments[0])
        if isinstance(path, str) and ("outside" in Path(os.path.abspath(path)).parts or path == "/etc/passwd"):
            opened.append(path)


sys.addaudithook(_watch)


@contextmanager
def nothing_outside(home: Path) -> Iterator[None]:
    """Nothing that a lie may name is opened or changed meanwhile."""
    global watching
    watching = True
    try:
        yield
    finally:
        watching = False
    found = opened.copy()
    opened.clear()
    assert found == []
    assert [path.name for path in (home / "outside").iterdir()] == ["secret"]
    assert (home / "outside" / "secret").read_text() == "not yours"


def readings(home: Path, about: str) -> Iterator[Callable[[], object]]:
    """Every reading of a home's files that may see a lie about `about`: a kind of store, the run, the cache."""
    root, one = home / "cache", home / "runs/one"
    yield lambda: [catalogue.entry(store).as_json() for store in catalogue.readable(root)[0]]
    yield lambda: (catalogue.latest(root), catalogue.readable_runs(home / "runs"))
    for path in sorted((root / about).iterdir()) if about in catalogue.kinds() else ():
        yield lambda path=path: verify([inspect_damage(path)], lambda _: None)
        yield lambda path=path: catalogue.opened(path).describe()
        yield lambda path=path: (catalogue.opened(path).hints, catalogue.opened(path).requested)
        yield lambda path=path: usage.usage(catalogue.opened(path))
        yield lambda path=path: read_rows(catalogue.opened(path))
    if about != "run":
        return
    yield lambda: garbage.survey(root, catalogue.readable_runs(home / "runs", all_tools=True)[0], 0.0)
    yield lambda: Run(one).metrics()
    yield lambda: Run(one).evaluation()
    yield lambda: Run(one).load_checkpoint()
    yield lambda: settings_of(Run(one))
    yield lambda: trained.load_run(Run(one))
    yield lambda: compare([Run(one)])
    yield lambda: page([read(Run(one))])


def read_rows(store: Store) -> None:
    n = store.n_rows
    if isinstance(store, TokenStore):
        assert store.contexts(0, n).shape == store.document_ids(0, n).shape and len(store.lengths(0, n)) == n
        store.vocabulary()
        return
    assert isinstance(store, ActivationStore)
    assert store.rows(0, n).isfinite().all() and len(store.norms(0, n)) == len(store.positions(0, n)) == n
    with Loader(store, 16, epochs=1) as loader:
        assert sum(map(len, loader)) == n
    rule_of(store)
    hints.model_of(store, None, offline=True)


def training(home: Path) -> dict[str, Path]:
    """The training stores as they are there now, by the first letter of their kind."""
    found = {kind: sorted((home / "cache" / kind).iterdir()) for kind in catalogue.kinds()}
    return {kind[0]: next(path for path in every if "-validation-" not in path.name) for kind, every in found.items()}


def some(home: Path) -> list[Lie]:
    """A few lies of every kind, the same every time."""
    kinds: dict[str, list[Lie]] = {}
    for lie in lies(home):
        kinds.setdefault(re.sub(r"[^a-z./ ]+", "0", " ".join(lie.name.split()[:2])), []).append(lie)
    each = -(-FEW // len(kinds))
    chance = random.Random(0)
    return [lie for name in sorted(kinds) for lie in chance.sample(kinds[name], min(each, len(kinds[name])))]


def test_no_reading_believes_a_lie(home: Path) -> None:
    """Every reading gives what it gives, or one line: a SaeError."""
    chosen = some(home)
    assert len(chosen) >= FEW // 2
    for lie in chosen:
        with told(home, lie), nothing_outside(home):
            for reading in readings(home, lie.name.partition(":")[0]):
                try:
                    reading()
                except SaeError:
                    continue
                except Exception as error:
                    raise AssertionError(lie.name) from error


def test_the_honest_home_is_read(home: Path) -> None:
    for about in (*catalogue.kinds(), "run", "cache"):
        for reading in readings(home, about):
            reading()
    assert sae("cache verify").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, 8, 4))
def test_no_command_believes_a_lie(home: Path, part: int) -> None:
    """Every command ends with 0, 2 or 3, with lines that say why, and never with a traceback."""
    for lie in some(home)[part::8]:
        for command in COMMANDS:
            with told(home, lie), nothing_outside(home):
                stores = {kind: sorted((home / "cache" / kind).iterdir()) for kind in ("activations", "tokens")}
                first = {
                    kind[0]: next(p for p in found if "-validation-" not in p.name) for kind, found in stores.items()
                }
                if "resume" in command and (home / "runs/one/sae_weights.safetensors").is_file():
                    (home / "runs/one/sae_weights.safetensors").unlink()
                answer = sae(command.format(**first))
            about = f"{lie.name}: {command}: {answer.err}"
            assert answer.code in (0, 2, 3) and "Traceback" not in answer.err, about
            assert not answer.code or answer.err.splitlines()[-1].startswith("sae: error: "), about
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", answer.out + answer.err), about


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "commands"),
    [
        ("activations: position/c/0 holds zeros", ()),
        ("activations: position/c/0 holds halves", ("report", "inspect", "export")),
        ("activations: position/c/0 holds ones", ("report", "inspect", "export")),
        ("tokens: tokens/c/0/0 holds halves", ("report", "harvest")),
        ("tokens: length/c/0 holds ones", ("report", "harvest")),
        ("tokens: length/c/0 holds zeros", ("report",)),
        ("tokens: document/c/0/0 holds ones", ()),
        ("activations: row_scale/c/0 holds signs", ("report", "export", "train", "eval")),
        ("activations: row_scale/c/0 holds zeros", ("report", "export", "train", "eval")),
        ("activations: col_scale/c/0 holds zeros", ("report", "export", "train", "eval")),
        ("activations: col_mean/c/0 holds halves", ("eval",)),
        ("activations: row_norm/c/0 holds ones", ()),
    ],
)  # fmt: skip
def test_numbers_that_no_writer_writes(home: Path, lie: str, commands: tuple[str, ...]) -> None:
    """They end in one line wherever they would matter."""
    every = {
        "inspect": "cache inspect {a} --shuffle-quality", "export": "cache export {a} out --with-tokens --order token",
        "train": "train --d-sae 32 --k 4 --batch 16 --steps 2 --name new --activations {a} --device cpu",
        "harvest": "harvest --model model --layer 1 --site mlp_out --tokens-from {t} --codec float32",
        "report": "report one --device cpu", "eval": "eval one --device cpu",
    }  # fmt: skip
    told_lie = next(one for one in lies(home) if one.name.startswith(f"{lie}"))
    for name, command in every.items():
        (home / "runs/one" / STATISTICS).unlink(missing_ok=True)  # of the rows as they were
        with told(home, told_lie), nothing_outside(home):
            first = training(home)
            answer = sae(command.format(**first))
        assert answer.code in ((2, 3) if name in commands else (0, 2, 3)), (lie, command, answer)
        assert "Traceback" not in answer.err
        assert not answer.code or answer.complaint
