"""A repository of the hub: what lies in it, files put there in commits, files fetched from it.

Both ways go on where they were stopped: a file that is there already, by its size and hash, is not sent again, and one
that was fetched is not fetched again. What a store needs to be read is sent last and a folder takes its place when all
is there and was checked, so half of one is never taken for a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.runtime.network import Kind, Refused, ask, hub_address, offline_wanted, reachable

FILES = 200  # in a commit, at most
BYTES = 1 << 30  # in a commit, about
THREADS = 8
Advance = Callable[[int], None]


class Remote(NamedTuple):
    """A file of a repository: its path there, its size, and the hash it is known by."""

    path: str
    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class Repository:
    """owner/name on the hub, of models (runs) or of data sets (stores)."""

    name: str
    kind: Kind
    offline: bool = False

    @property
    def page(self) -> str:
        """Its address."""
        return f"{hub_address()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def create(self, *, private: bool) -> None:
        """Make it, where it is not there."""
        from huggingface_hub import HfApi

        self._ask(lambda: HfApi().create_repo(self.name, repo_type=self.kind, private=private, exist_ok=True))

    def files(self, revision: str = "main") -> dict[str, Remote]:
        """Every file, by its path. Raises NotFound where there is no such repository."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        def listed() -> list[Any]:
            return [*HfApi().list_repo_tree(self.name, repo_type=self.kind, revision=revision, recursive=True)]

        found = {}
        for one in self._ask(listed):
            if isinstance(one, RepoFile):
                found[one.path] = Remote(one.path, one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)
        return found

    def put(self, files: Mapping[str, Path | bytes], last: Mapping[str, Path | bytes], advance: Advance) -> int:
        """Send files, by their paths there, those of `last` in the end; how many bytes were not there already."""
        there, sent = self.files(), 0
        for group in [*_groups(files), dict(last)]:
            new = {path: local for path, local in group.items() if not _is(local, there.get(path))}
            if new:
                self._commit(new)
                sent += sum(map(_size, new.values()))
            advance(sum(map(_size, group.values())))
        return sent

    def get(self, files: Sequence[Remote], folder: Path, advance: Advance) -> None:
        """Fetch files into a folder, each under its path in the repository."""
        from huggingface_hub import hf_hub_download

        def fetch(one: Remote) -> int:
            ask(
                self.name,
                partial(hf_hub_download, self.name, one.path, repo_type=self.kind, local_dir=folder),
                self.kind,
            )
            return one.size

        with self._words(), ThreadPoolExecutor(THREADS) as pool:
            for size in pool.map(fetch, files):
                advance(size)

    def _commit(self, files: Mapping[str, Path | bytes]) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        added = [
            CommitOperationAdd(path, local if isinstance(local, bytes) else str(local)) for path, local in files.items()
        ]
        message = f"Add {min(path.rpartition('/')[0] or path for path in files)}"

        def commit() -> None:
            try:
                HfApi().create_commit(self.name, added, commit_message=message, repo_type=self.kind)
            except RuntimeError as error:  # what the library makes of whatever a large file met with
                raise error.__cause__ or error from error

        self._ask(commit, tries=1)

    def _ask(self, call: Callable[[], Any], tries: int = 3) -> Any:
        with self._words():
            return ask(self.name, call, self.kind, tries=tries)

    @contextmanager
    def _words(self) -> Iterator[None]:
        """A line for what the hub refuses."""
        if offline_wanted(self.offline):
            raise SaeError(f"{self.name}: the hub is needed for this, and offline was asked for")
        if not reachable(hub_address()):
            raise SaeError(f"{self.name}: {hub_address()} cannot be reached; try again with a network")
        try:
            yield
        except Refused as refused:
            raise (NotFound if refused.definite else SaeError)(f"{self.name}: {refused}") from refused


def expect_inside(path: str, folder: str) -> None:
    """Raise SaeError where a path of a repository does not lie in a folder of it."""
    parts = PurePosixPath(path).parts
    if ".." in parts or not path.startswith(f"{folder}/") or "\\" in path or "\0" in path:
        raise SaeError(f"{path}: leads out of its folder in the repository; nothing was fetched")


def _groups(files: Mapping[str, Path | bytes]) -> Iterator[dict[str, Path | bytes]]:
    """What goes into a commit each."""
    group: dict[str, Path | bytes] = {}
    size = 0
    for path, local in files.items():
        if group and (len(group) == FILES or size + _size(local) > BYTES):
            yield group
            group, size = {}, 0
        group[path] = local
        size += _size(local)
    if group:
        yield group


def _size(local: Path | bytes) -> int:
    return len(local) if isinstance(local, bytes) else local.stat().st_size


def _is(local: Path | bytes, remote: Remote | None) -> bool:
    """Return True if a file lies in the repository as it is here."""
    if remote is None or remote.size != _size(local):
        return False
    digest = hashlib.sha256() if remote.sha256 else hashlib.sha1(b"blob %d\0" % remote.size)  # as git names a blob
    if isinstance(local, bytes):
        digest.update(local)
    else:
        with open(local, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest() == (remote.sha256 or remote.blob)
