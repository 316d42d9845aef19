"""Whatever ends a harvest, what was computed of its window goes on where it ended, to the same bytes."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.harvesting import harvest
from support.killing import Killed, killed_after
from support.small_models import CONTEXT, made_up, save_model, small_stages, token_store
from support.small_stores import files

from sae.cache.disk.durable import PARTIAL
from sae.cache.errors import SaeError
from sae.cache.store import scratch
from sae.cache.store.contents import is_own, is_temporary
from sae.pipeline.harvest import keeping
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.harvest.stage import HarvestResult
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.interrupts import SIGNALS, Interrupted
from sae.pipeline.runtime.progress import Silent

CONTEXTS = 14  # rows of four windows, the last one short
IDENTITY = {"span": [1, 2], "made": "here"}


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with small_stages():
        yield


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is kept."""
    monkeypatch.setattr(keeping, "EVERY", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


class Watching(Silent):
    """Keeps what is said, and calls `act` at the batch `at`."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.lines: list[str] = []
        self.begun: list[int] = []
        self.rows, self.left, self.act = 0, at, act

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.begun.append(done)

    def advance(self, n: int, **_: object) -> None:
        self.rows += n
        self.left -= 1
        if self.left == 0:
            self.act()

    def note(self, line: str) -> None:
        self.lines.append(line)


def run(model: Path, root: Path, progress: Silent | None = None, **settings: Any) -> HarvestResult:
    given = {"layer": (1,), "site": ("mlp_out", "resid_post"), "batch_tokens": 2 * CONTEXT, "codec": "int8", **settings}
    tokens = token_store(root, made_up(CONTEXTS))
    return harvest(HarvestConfig(model=str(model), **given), [tokens], root, progress or Silent())


def everything(root: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: files(path) for path in sorted((root / "activations").glob("*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """What an uninterrupted harvest leaves, by codec."""
    found = {}
    for codec in ("int8", "bfloat16", "float32"):
        root = tmp_path_factory.mktemp(codec)
        run(model, root, codec=codec)
        found[codec] = everything(root)
    return found


class ForwardPass:
    """Counts forward passes; the one after `left` of them raises."""

    def __init__(self, patch: pytest.MonkeyPatch, left: int = 1 << 30, error: type[BaseException] = Killed) -> None:
        self.done, activate = 0, LanguageModel.activations

        def counted(*args: Any) -> Any:
            if self.done == left:
                raise error
            self.done += 1
            return activate(*args)

        patch.setattr(LanguageModel, "activations", counted)


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "float32"])
def test_no_forward_pass_is_done_twice(
    tmp_path_factory: pytest.TempPathFactory, model: Path, whole: dict[str, Any], codec: str
) -> None:
    """Killed in the place of any pass: the next harvest does that one and those after it, to the same bytes."""
    remaining: list[int] = []
    for passes in range(100):
        root = tmp_path_factory.mktemp("killed")
        errors = (Killed, KeyboardInterrupt, SaeError)
        with pytest.MonkeyPatch.context() as patch, suppress(*errors):
            counted = ForwardPass(patch, passes, errors[passes % 3])
            run(model, root, codec=codec)
        with pytest.MonkeyPatch.context() as patch:
            again = ForwardPass(patch)
            run(model, root, codec=codec)
        remaining.append(again.done)
        assert everything(root) == whole[codec] and not list(root.rglob(f"*{PARTIAL}"))
        if counted.done < passes:
            assert counted.done > 6 and remaining == [max(counted.done - i, 0) for i in range(passes + 1)]
            return
    pytest.fail("a harvest of so few contexts ends")


def test_killed_at_any_write(tmp_path_factory: pytest.TempPathFactory, model: Path, whole: dict[str, Any]) -> None:
    """Also in the middle of keeping, of committing, and between the commits of two stores."""
    for renames in range(0, 400, 7):
        root = tmp_path_factory.mktemp("killed")
        token_store(root, made_up(CONTEXTS))
        with killed_after(renames) as came:
            run(model, root)
        run(model, root)
        assert everything(root) == whole["int8"] and not list(root.rglob(f"*{PARTIAL}")), renames
        if not came:
            return
    pytest.fail("a harvest of so few contexts ends")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_signal_keeps_what_there_is_and_says_so(
    tmp_path: Path, model: Path, whole: dict[str, Any], batch: int, number: signal.Signals, monkeypatch: Any
) -> None:
    monkeypatch.setattr(keeping, "EVERY", float("inf"))
    stopping = Watching(batch, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted) as stopped:
        run(model, tmp_path, stopping)
    assert stopped.value.number == number
    folders = list((tmp_path / "activations").iterdir())
    committed = max(start for start in (0, 32, 64, 128) if start < stopping.rows)
    kept = stopping.rows - committed
    assert keeping.rows_kept(folders, 0) == kept > 0
    assert stopped.value.safe == (
        f"{committed} of 184 train rows are committed, and {kept} of an unfinished window are kept to go on from"
    )
    going_on = Watching()
    run(model, tmp_path, going_on)
    assert f"{kept} rows of an unfinished window were kept and are taken up" in going_on.lines
    assert going_on.begun[-1] == stopping.rows and going_on.rows == 184 - stopping.rows
    assert everything(tmp_path) == whole["int8"]


def interrupted(model: Path, root: Path, passes: int, **settings: Any) -> list[Path]:
    """The files that a harvest killed after so many passes has kept."""
    with pytest.MonkeyPatch.context() as patch:
        ForwardPass(patch, passes)
        with pytest.raises(Killed):
            run(model, root, **settings)
    return sorted(path for path in root.rglob(f"under-way*{PARTIAL}"))


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "empty", "one alone"])
def test_damaged_parts_are_computed_again(tmp_path: Path, model: Path, whole: dict[str, Any], how: str) -> None:
    parts = interrupted(model, tmp_path, 6)
    assert len(parts) >= 4
    data = parts[1].read_bytes()
    if how == "one alone":  # its site only is behind
        parts[0].unlink()
    else:
        parts[1].write_bytes(
            {"flipped": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "cut": data[:-1], "longer": data + b"0",
             "empty": b""}[how]
        )  # fmt: skip
    notes = Watching()
    run(model, tmp_path, notes)
    said = [line for line in notes.lines if "are computed again" in line]
    assert len(said) == (how != "one alone") and all(str(parts[1]) in line for line in said)
    assert everything(tmp_path) == whole["int8"]


def test_parts_of_other_batches_are_not_taken_up(tmp_path: Path, model: Path) -> None:
    """Their bits may differ: each batch has its own rounding."""
    assert len(interrupted(model, tmp_path / "mixed", 1)) == 2
    notes = Watching()
    run(model, tmp_path / "mixed", notes, batch_tokens=3 * CONTEXT)
    assert sum("were computed otherwise" in line for line in notes.lines) == 2
    run(model, tmp_path / "alone", batch_tokens=3 * CONTEXT)
    assert everything(tmp_path / "mixed") == everything(tmp_path / "alone")


def test_quick_windows_keep_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "EVERY", 30.0)
    monkeypatch.setattr(scratch, "keep", lambda *_: pytest.fail("kept something"))
    run(model, tmp_path)


def test_a_disk_that_takes_no_parts_ends_nothing(
    tmp_path: Path, model: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SaeError("no space left on the disk")

    monkeypatch.setattr(scratch, "keep", full)
    notes = Watching()
    run(model, tmp_path, notes)
    assert "rows of the window under way cannot be kept: no space left on the disk" in notes.lines
    assert everything(tmp_path) == whole["int8"]


def test_what_is_kept_comes_back_or_nothing(tmp_path: Path) -> None:
    """Every flipped bit and every cut of a file is noticed, and so is another identity and another shape."""
    arrays = [np.arange(6, dtype="<f4").reshape(3, 2), np.arange(3, dtype="<i8")]
    shapes = [("<f4", (3, 2)), ("<i8", (3,))]
    scratch.keep(tmp_path, 2, 4, 7, IDENTITY, arrays)
    (part,) = scratch.kept(tmp_path)
    assert part[1:] == (2, 4, 7) and scratch.chain(tmp_path, 2) == []  # nothing leads to it
    found = scratch.take(part, IDENTITY, shapes)
    assert found is not None and all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))
    assert scratch.take(part, {**IDENTITY, "made": "there"}, shapes) is None
    assert scratch.take(part, IDENTITY, [("<f4", (2, 3)), ("<i8", (4,))]) is None
    data = part.path.read_bytes()
    for at in range(len(data)):
        part.path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert scratch.take(part, IDENTITY, shapes) is None, at
        part.path.write_bytes(data[:at])
        assert scratch.take(part, IDENTITY, shapes) is None, at


def test_the_longest_of_two_parts_leads_on(tmp_path: Path) -> None:
    for start, stop in ((0, 2), (0, 5), (2, 3), (5, 6), (7, 9)):
        scratch.keep(tmp_path, 0, start, stop, IDENTITY, [])
    assert [(part.start, part.stop) for part in scratch.chain(tmp_path, 0)] == [(0, 5), (5, 6)]
    assert keeping.rows_kept([tmp_path], 0) == 6 and keeping.rows_kept([tmp_path], 1) == 0
    assert scratch.is_wanted("under-way-1.0-5.partial", 1) and not scratch.is_wanted("under-way-0.0-5.partial", 1)
    assert not scratch.is_wanted("under-way-1.0-5.partial", None) and not scratch.is_wanted("x.partial", 0)
    assert all(is_own(path.name) and is_temporary(path.name) for path in tmp_path.iterdir())
