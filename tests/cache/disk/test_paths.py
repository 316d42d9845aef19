"""Stores on remote filesystems: the same bytes, the same promises; what a URL may be."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.command_line import done, sae
from support.small_s3 import BUCKET, lead_to, s3_server
from support.small_stores import CHUNK, N, closed_store, files, heavy_rows, shrunk, window_arrays, write_activations
from support.small_tokens import OTHERS, write_tokens

from sae.cache import activations, catalogue, tokens
from sae.cache.activations import ActivationStore
from sae.cache.disk import locks
from sae.cache.disk.durable import append_line, read, write_atomic
from sae.cache.disk.locks import LOCK, Lock, held
from sae.cache.disk.paths import expect_reachable, filesystem, is_remote, listing, parse_path
from sae.cache.errors import Busy, DamagedStore, SaeError
from sae.cache.loader.loader import Loader
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST, Windows
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.cache.upkeep import removing

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as found, shrunk(), pytest.MonkeyPatch.context() as patch:
        lead_to(patch, found)
        filesystem(parse_path(f"s3://{BUCKET}")).mkdir(BUCKET)
        yield found


@pytest.fixture
def s3(endpoint: str, request: pytest.FixtureRequest) -> Path:
    """A prefix of its own for each test."""
    return parse_path(f"s3://{BUCKET}/{plain(request.node.name)}")


@pytest.fixture(params=["s3", "memory"])
def remote(request: pytest.FixtureRequest) -> Path:
    if request.param == "s3":
        found: Path = request.getfixturevalue("s3")
        return found
    request.getfixturevalue("endpoint")  # for the small windows
    return parse_path(f"memory://{plain(request.node.name)}")


def plain(name: str) -> str:
    """A test's name without what a pattern is made of."""
    return name.replace("[", "-").replace("]", "")


def remote_files(folder: Path) -> dict[str, bytes]:
    """As `small_tokens.files`, of a remote folder."""
    return {name: (folder / name).read_bytes() for name in listing(folder) if name not in OTHERS}


@pytest.mark.parametrize(
    ("remote", "kind"), [("s3", "activations"), ("memory", "tokens"), ("memory", "activations")], indirect=["remote"]
)
def test_the_bytes_are_those_of_a_local_store(remote: Path, tmp_path: Path, kind: str) -> None:
    there, here = closed_store(kind, remote), closed_store(kind, tmp_path)
    assert remote_files(there.path) == files(here.path)
    assert [there.damage(name) for name in [*there.metadata(), *there.committed_files()]].count(None) > N // CHUNK
    assert not any(there.damage(name) for name in [*there.metadata(), *there.committed_files()])
    assert LOCK not in listing(there.path)
    assert str(there.path) == f"{remote}/{kind}/{there.key}"


@pytest.mark.parametrize("remote", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_growing_and_reading(remote: Path, tmp_path: Path) -> None:
    rows = heavy_rows(N, 7)
    for stop in (CHUNK, 2 * CHUNK, 4 * CHUNK):
        store = write_activations(remote, rows[:stop])
        assert store.n_rows == stop
    store = write_activations(remote, rows, ended=True)
    here = write_activations(tmp_path, rows, ended=True)
    assert remote_files(store.path) == files(here.path)
    np.testing.assert_array_equal(store.rows(0, N).numpy(), here.rows(0, N).numpy())
    there, beside = (Loader(one, 16, epochs=1, open_chunks=4) for one in (store, here))
    assert [batch.tolist() for batch in there] == [batch.tolist() for batch in beside]


def test_the_catalogue(remote: Path) -> None:
    tokens = write_tokens(remote, CHUNK, ended=True)
    rows = write_activations(remote, heavy_rows(CHUNK, 5))
    assert [store.key for store in catalogue.stores(remote)] == [tokens.key, rows.key]
    assert [store.key for store in catalogue.readable(remote)[0]] == [tokens.key, rows.key]
    for name in (rows.key, rows.key[:-2], str(rows.path), f"{rows.path}/"):
        assert catalogue.find(remote, ActivationStore, name).path == rows.path
        assert catalogue.any_store(remote, name).path == rows.path
    assert catalogue.latest(remote) == {}
    catalogue.remember(remote, "tokens", [tokens.key])
    assert catalogue.latest(remote) == {"tokens": [tokens.key]}
    assert catalogue.find(remote, TokenStore, None).path == tokens.path
    before = catalogue.bytes_in(rows.path)
    assert before > rows.manifest.stored_bytes
    assert removing.remove(remote, rows.path) > rows.manifest.stored_bytes
    assert listing(rows.path) == {}
    assert [store.key for store in catalogue.stores(remote)] == [tokens.key]


@pytest.mark.parametrize(
    ("remote", "change"),
    [("memory", "missing"), ("memory", "changed"), ("memory", "shorter"), ("s3", "changed")],
    indirect=["remote"],
)
def test_damage_is_noticed_and_named(remote: Path, change: str) -> None:
    store = closed_store("tokens", remote)
    names = [RECIPE, "vocabulary.json", "tokens/c/2/0", "length/zarr.json", MANIFEST]
    for name in names[2:3] if str(remote).startswith("s3") else names:
        data = (store.path / name).read_bytes()
        if change == "missing":
            (store.path / name).unlink()
        else:
            write_atomic(
                store.path / name, data[:-9] + (b"" if change == "shorter" else bytes([data[-9] ^ 4]) + data[-8:])
            )
        try:
            fresh = TokenStore(store.path)
            said = " ".join(filter(None, (fresh.damage(n) for n in [*fresh.metadata(), *fresh.committed_files()])))
        except SaeError as error:
            said = str(error)
        # a last line without its end is what a crash leaves: the store is only not closed
        assert name in said or (name, change) == (MANIFEST, "shorter"), (name, said)
        write_atomic(store.path / name, data)


def test_missing_rows_are_never_filled_in(s3: Path) -> None:
    store = closed_store("activations", s3)
    (store.path / "rows/c/2/0").unlink()
    assert isinstance(store, ActivationStore)
    with pytest.raises(DamagedStore, match=r"rows/c/2/0: missing, though it was committed"):
        store.rows(60, 80)
    with pytest.raises(DamagedStore, match=r"rows/c/2/0"):
        list(Loader(store, 16, epochs=1))


def test_what_a_crash_left_is_cleared_away(s3: Path) -> None:
    store = write_tokens(s3, 2 * CHUNK)
    before = remote_files(store.path)
    for name in ("tokens/c/2/0", "length/c/3"):
        write_atomic(store.path / name, b"left")
    write_atomic(store.path / "tokens/zarr.json", store.arrays["tokens"].metadata(CHUNK))
    assert store.refreshed().n_rows == 2 * CHUNK
    write_tokens(s3, 2 * CHUNK)
    assert remote_files(store.path) == before


def test_a_log_is_appended_to(remote: Path) -> None:
    append_line(remote / "log", "one")
    write_atomic(remote / "log", (remote / "log").read_bytes() + b"tor")
    append_line(remote / "log", "two")
    assert read(remote / "log") == b"one\ntwo\n"
    assert read(remote / "nothing") is None


@pytest.fixture
def requests(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the requests that are made to S3 from here on."""
    from aiobotocore.client import AioBaseClient

    made: list[str] = []
    call = AioBaseClient._make_api_call

    async def noted(self: AioBaseClient, kind: str, *args: object) -> object:
        made.append(kind)
        return await call(self, kind, *args)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noted)
    return made


@pytest.mark.parametrize(
    ("data", "most", "found"),
    [
        (b"0123456789", None, b"0123456789"), (b"0123456789", 10, b"0123456789"), (b"0123456789", 4, b"01234"),
        (b"", None, b""), (b"", 10, b""), (None, None, None), (None, 10, None),
    ],
)  # fmt: skip
def test_a_read_is_one_request(
    s3: Path, requests: list[str], data: bytes | None, most: int | None, found: bytes | None
) -> None:
    """Whole or in part, empty or missing; and no more is read than is asked for, but the byte that tells of more."""
    if data is not None:
        write_atomic(s3 / "file", data)
    requests.clear()
    assert read(s3 / "file", most) == found
    assert requests == ["GetObject"]


def test_a_chunk_is_one_request(s3: Path, requests: list[str]) -> None:
    """And so is each of the small files that are read when a store is opened."""
    store = write_activations(s3, heavy_rows(N, 3))
    requests.clear()
    store = ActivationStore(store.path)
    growing = [array for array in store.arrays.values() if array.grows]
    assert requests == ["GetObject"] * (len(growing) + len([RECIPE, MANIFEST, "zarr.json"]))
    for array in ("rows", "position"):
        requests.clear()
        store.chunk(array, 1)
        assert requests == ["GetObject"]
    requests.clear()
    assert sum(len(batch) for batch in Loader(store, 16, epochs=1, open_chunks=4)) > N - 16
    files = store.n_chunks * (2 if store.codec.has_row_scale else 1) + len(["col_mean", "col_scale"])
    assert requests == ["GetObject"] * files
    empty = store.path / "rows/c/1/0"
    write_atomic(empty, b"")
    with pytest.raises(DamagedStore, match=r"rows/c/1/0: damaged \(its checksum differs\)"):
        store.chunk("rows", 1)


# --- locks ----------------------------------------------------------------------------------------------------------


def test_only_one_writer(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with Lock(remote) as lock:
        assert lock.stale is None
        assert held(remote)
        with pytest.raises(Busy, match=rf"process {os.getpid()} on .* since .*; wait for it, or if"):
            Lock(remote).__enter__()
    assert not held(remote)
    with Lock(remote) as lock:
        assert lock.stale is None


def test_the_lock_of_a_dead_process_here_is_taken_over(remote: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left = json.loads(locks._me()) | {"pid": process.pid}
    write_atomic(remote / LOCK, json.dumps(left).encode())
    assert not held(remote)
    with Lock(remote) as lock:
        assert lock.stale is not None
        assert f"took over the lock that process {process.pid} on" in lock.stale
        assert held(remote)
    assert read(remote / LOCK) is None


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"space": "pid:[1]"}])
def test_the_lock_of_another_machine_is_left_alone(
    s3: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    write_atomic(s3 / LOCK, json.dumps(json.loads(locks._me()) | {"pid": process.pid} | other).encode())
    assert held(s3)
    with pytest.raises(Busy, match=f"if that process is gone delete {s3 / LOCK}"):
        Lock(s3).__enter__()
    (s3 / LOCK).unlink()
    with Lock(s3):
        pass


def test_a_lock_that_was_deleted_stops_its_writer(s3: Path) -> None:
    store = write_tokens(s3, CHUNK)
    with Lock(store.path) as lock:
        lock.confirm()
        (store.path / LOCK).unlink()
        with pytest.raises(Busy, match="its lock was taken away while this process was writing"):
            lock.confirm()
        with Lock(store.path):
            lock.__exit__(None, None, None)  # not its own any more
            assert held(store.path)


def test_an_answer_lost_is_no_other_writer(s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock was created, but the answer did not come, and the client asked again."""
    create = filesystem(s3).pipe_file

    def twice(*args: object, **options: object) -> None:
        create(*args, **options)
        create(*args, **options)

    monkeypatch.setattr(filesystem(s3), "pipe_file", twice)
    with Lock(s3):
        assert held(s3)


CONTENDER = """
import sys
from sae.cache.errors import Busy
from sae.cache.disk.locks import Lock
from sae.cache.disk.paths import parse_path
sys.stdin.readline()
try:
    with Lock(parse_path(sys.argv[1])):
        print("mine", flush=True)
        sys.stdin.readline()
except Busy:
    print("busy", flush=True)
"""


def test_contending_processes(s3: Path) -> None:
    """Of two that come at once, one has it."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(s3)], cwd=PROJECT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(p.stdout.readline() for p in started if p.stdout) == ["busy\n", "mine\n"]
    for process in started:
        process.communicate("\n")
    assert not held(s3)


WRITER = """
import sys
sys.path[:0] = ["tests"]
from support.small_tokens import write_tokens
from sae.cache import tokens
from sae.cache.disk.paths import parse_path
tokens.CHUNK_TOKENS, tokens.WINDOW_CHUNKS = 256, 4
write_tokens(parse_path(sys.argv[1]), 100_000)
"""


@pytest.mark.slow
def test_kill_9(s3: Path, tmp_path: Path) -> None:
    """A real process, killed wherever it happens to be; the next takes its lock over and ends with the same bytes."""
    rows = 0
    for delay in (0.0, 0.03):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(s3)], cwd=PROJECT) as process:
            while rows == (now := committed_rows(s3)):
                assert process.poll() is None
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        store = catalogue.stores(s3)[0]
        assert store.n_rows >= now > rows
        assert (store.path / LOCK).exists()
        assert not any(store.damage(name) for name in store.committed_files())
        rows = store.n_rows
    resumed = write_tokens(s3, rows + 4 * CHUNK)
    assert remote_files(resumed.path) == files(write_tokens(tmp_path, rows + 4 * CHUNK).path)


def committed_rows(root: Path) -> int:
    found = catalogue.stores(root)
    return found[0].n_rows if found else 0


# --- what cannot be used ----------------------------------------------------------------------------------------------


def complaint(url: str) -> str:
    answer = sae("cache ls --cache", url)
    assert answer.code == 2
    return answer.complaint


def test_what_cannot_be_used(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint("nonsense://x/y").startswith("nonsense://x/y: cannot be used (Unsupported filesystem: 'nonsense')")
    assert (
        complaint("gs://x/y") == 'gs://x/y: needs the package gcsfs, which is not installed; `pip install "fsspec[gs]"`'
    )
    assert complaint("s3://") == "--cache s3://: names no bucket or folder; write s3://bucket/prefix"
    missing = complaint("s3://no-such-bucket/x")
    assert complaint("s3://a*/x") == "s3://a*/x: *, ? and [ are patterns to remote filesystems; choose another name"
    assert missing.startswith("--cache s3://no-such-bucket/x: cannot be used (The specified bucket does not exist)")
    assert "check the bucket, AWS_ENDPOINT_URL and the credentials" in missing
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "Invalid endpoint: nonsense" in complaint("s3://b1/prefix")


@pytest.fixture
def afresh(endpoint: str) -> Iterator[None]:
    """Filesystems made from the environment as it is now, not those of earlier tests."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def test_an_endpoint_that_does_not_answer(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert "Could not connect to the endpoint URL" in complaint("s3://bucket/x")


def test_no_credentials(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "cannot be used (Unable to locate credentials)" in complaint("s3://bucket/x")


def test_without_the_extra(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")  # as if not yet looked for
    assert complaint("s3://bucket/x") == (
        's3://bucket/x: needs the package s3fs, which is not installed; `pip install "sae-cache[s3]"`'
    )


def test_a_failed_request_is_one_line(s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    store = write_tokens(s3, CHUNK)

    def gone(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://gone")

    for name in ("pipe_file", "cat_file", "_cat_file"):
        monkeypatch.setattr(filesystem(s3), name, gone)
    with pytest.raises(SaeError, match=r"cannot be written \(Could not connect .*\); what was committed is safe"):
        write_atomic(s3 / "x", b"")
    with pytest.raises(SaeError, match=r"cannot be written|cannot be read"):
        write_tokens(s3, 2 * CHUNK)
    monkeypatch.undo()
    assert write_tokens(s3, 2 * CHUNK).n_rows == 2 * CHUNK
    assert isinstance(store, Store)


def test_an_outage_in_the_middle_of_a_command(s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, wherever it came from."""
    from botocore.exceptions import ReadTimeoutError

    write_tokens(s3, CHUNK)

    def gone(*_: object, **__: object) -> None:
        raise ReadTimeoutError(endpoint_url="http://gone")

    monkeypatch.setattr(catalogue, "folders", gone)
    assert complaint(str(s3)).startswith("the remote filesystem failed (Read timeout on endpoint URL")


def test_local_places(tmp_path: Path) -> None:
    assert not is_remote(parse_path("a/b")) and parse_path("a/b") == Path("a/b")
    assert parse_path(f"file://{tmp_path}") == tmp_path
    with pytest.raises(AssertionError):
        expect_reachable("cache", tmp_path)
    assert listing(tmp_path / "nowhere") == {}


def test_the_rows_read_are_the_rows_written(s3: Path) -> None:
    store = write_tokens(s3, N, ended=True)
    np.testing.assert_array_equal(store.contexts(0, N), window_arrays(store.recipe, 0, N)["tokens"])


@pytest.mark.slow
def test_all_stages_on_s3(s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line, at small sizes: the same files as in a local cache, and a dictionary from them."""
    monkeypatch.setattr(activations, "CHUNK_ROWS", 512)  # fewer objects than in the other tests
    monkeypatch.setattr(activations, "WINDOWS", Windows(512, 1024))
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 1024)
    few_tokens, few_rows = (f"--set {stage}.validation_tokens=1000" for stage in ("tokenize", "harvest"))
    text = tmp_path / "text"
    text.mkdir()
    for number in range(400):
        words = " ".join(f"def name_{(number * 7 + i) % 50}(value): return value" for i in range(40))
        (text / f"{number:03}.txt").write_text(words)
    for root in (str(s3), str(tmp_path / "here")):
        monkeypatch.setenv("SAE_CACHE", root)
        done(f"tokenize --preset tiny --source '{text}/*.txt' --context 32 --tokens 4000 --workers 1 {few_tokens}")
        done(f"harvest --preset tiny --layer 1 --site mlp_out --tokens 4000 --device cpu --offline {few_rows}")
        assert done("cache ls --json").json
        assert "every byte as committed" in done("cache verify").out
        assert done("cache inspect --json tiny-1.mlp_out-files-tiny-32-int8").json["rows"] > 3000
    for kind in ("tokens", "activations"):
        for folder in (tmp_path / "here" / kind).iterdir():
            assert remote_files(s3 / kind / folder.name) == files(folder)
    monkeypatch.setenv("SAE_CACHE", str(s3))
    answer = done("train --d-sae 64 --k 8 --batch 32 --steps 20 --json --runs", tmp_path / "runs")
    assert answer.json["step"] == 20
    assert done("cache rm --yes tiny-1.mlp_out-files-tiny-32-int8").out.startswith("removed tiny-1.mlp_out")


@pytest.mark.parametrize("stop", range(4))
def test_a_removal_cut_short_is_completed(stop: int, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Remotely an object says that a store is none any more, whatever is left of it."""
    root = parse_path(f"memory://cut-short-{stop}")
    store, other = write_tokens(root, CHUNK), write_tokens(root, CHUNK, seed=1)
    remote, left = filesystem(root), [stop]

    def stopping(call: Callable[..., object]) -> Callable[..., object]:
        def instead(*args: object, **options: object) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return call(*args, **options)

        return instead

    with monkeypatch.context() as patch:
        for name in ("rm", "pipe_file", "rm_file"):
            patch.setattr(remote, name, stopping(getattr(remote, name)))
        with suppress(KeyboardInterrupt):
            removing.remove(root, store.path)
    before = {one.key for one in catalogue.stores(root)}
    assert other.key in before
    if stop < 2:  # neither the lock nor the word was written
        assert before == {store.key, other.key}
        return
    (store.path / LOCK).unlink(missing_ok=True)  # as of a process that is gone
    assert before == {other.key} and catalogue.without_recipe(root) == []
    assert write_tokens(root, CHUNK).n_rows == CHUNK
    assert catalogue.readable(root)[1] == [] and len(catalogue.stores(root)) == 2
    assert not [name for name in listing(root) if "removed" in name]
