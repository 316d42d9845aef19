"""A run or a store -> a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sae.cache.disk.paths import is_remote
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CONFIG, EVALUATION, LATENTS, WEIGHTS, WEIGHTS_CONFIG, Run
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.store import HINTS, REQUEST, Store
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.sharing import card
from sae.pipeline.sharing.repository import Repository

README = "README.md"
OF_RUN = (CONFIG, METRICS, EVALUATION, LATENTS, WEIGHTS_CONFIG, WEIGHTS)


class Pushed(NamedTuple):
    """Where it lies now, how much it is, and how much of it was not there before."""

    page: str
    path: str
    files: int
    bytes: int
    sent: int


def push_run(run: Run, repository: str, progress: Progress, *, private: bool = False, offline: bool = False) -> Pushed:
    """Put a finished run into a repository of models, as a folder that SAELens opens.

    Raises DamagedStore where it is damaged.
    """
    if not run.finished:
        raise NotFound(f"{run.path}: training has not finished; continue it with `train(resume=True, name={run.name})`")
    if damage := run.check():
        raise DamagedStore(damage[0])
    files = {name: run.path / name for name in OF_RUN if (run.path / name).exists()}
    last = {name: files.pop(name) for name in (WEIGHTS_CONFIG, CONFIG)}
    return _push(Repository(repository, "model", offline), run.name, files, last, card.of_run(run), progress, private)


def push_store(
    store: Store, repository: str, progress: Progress, *, private: bool = False, offline: bool = False
) -> Pushed:
    """Put a store into a repository of data sets, its chunks as they are, once each was compared with its checksum."""
    if is_remote(store.path):
        raise SaeError(f"{store.path}: only a cache on this machine is pushed; copy the store here first")
    view = inspect_damage(store.path)
    progress.start("verify", sum(view.files.values()), "B")
    try:
        findings = [*view.lines, *(finding.says for finding in verify([view], progress.advance))]
    finally:
        progress.finish()
    if findings:
        raise DamagedStore(findings[0])
    ours = {name: store.path / name for name in view.files if name not in (HINTS, REQUEST)}  # which are of this machine
    metadata = {name: ours.pop(name) for name in [*ours] if name.endswith("zarr.json")}
    last = metadata | {name: store.path / name for name in (MANIFEST, RECIPE)}
    path = f"{store.kind}/{store.key}"
    return _push(Repository(repository, "dataset", offline), path, ours, last, card.of_store(store), progress, private)


def _push(
    repository: Repository, path: str, files: dict[str, Path], last: dict[str, Path], page: bytes, progress: Progress,
    private: bool,
) -> Pushed:  # fmt: skip
    repository.create(private=private)
    size = sum(file.stat().st_size for file in [*files.values(), *last.values()]) + len(page)
    top = {} if README in repository.files() else {README: card.of_repository(repository.name, repository.kind)}
    progress.start("push", size + sum(map(len, top.values())), "B")
    try:
        sent = repository.put(
            {f"{path}/{name}": file for name, file in files.items()},
            {f"{path}/{name}": file for name, file in last.items()} | {f"{path}/{README}": page} | top,
            progress.advance,
        )
    finally:
        progress.finish()
    where = f"{repository.page}/tree/main/{path}"
    return Pushed(where, path, len(files) + len(last) + 1, size, sent)
