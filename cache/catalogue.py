"""The stores and runs on disk, and which one a name means.

A name is a key, the beginning of a key, or a path. A beginning means the store of the training documents, unless it
reaches into the part that says otherwise; of several codecs of one thing it means the finished one, where only one is.
Without a name, the store the last command made is meant. More than one answer is listed, never guessed.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sae.cache.activations import ActivationStore
from sae.cache.disk import removal
from sae.cache.disk.durable import read, write_atomic
from sae.cache.disk.identity import Recipe, canonical, digest
from sae.cache.disk.locks import held
from sae.cache.disk.parsing import MOST_BYTES, name_of_file, parsed_mapping, shown
from sae.cache.disk.paths import is_remote, parse_path
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.runs import CONFIG, Run
from sae.cache.seen import SeenStore
from sae.cache.store.head import RECIPE, read_head
from sae.cache.store.manifest import MANIFEST, Manifest
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore, sibling

LATEST = "latest.json"
FOUND_BY = {"activations": ("activations", "harvest"), "tokens": ("tokens_from", "tokenize")}
"""By kind of store: the argument that names one, and the call that makes one."""
REMEDY = ", though the store has rows; remove the folder, or repeat the command that made the store"

AnyStore = TypeVar("AnyStore", bound=Store)


@dataclass(frozen=True)
class Entry:
    """One line of `sae cache ls`."""

    key: str
    kind: str
    slug: str
    rows: int
    bytes: int
    path: str
    complete: bool

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def kinds() -> dict[str, type[Store]]:
    """Every kind of store."""
    return {kind.kind: kind for kind in (TokenStore, ActivationStore)}


def folders(root: Path, kind: str) -> list[Path]:
    """Folders of the stores of one kind, by name."""
    return holding(root / kind, RECIPE)


def holding(parent: Path, file: str) -> list[Path]:
    """The folders in a folder that hold a file, by name; without those that are being removed."""
    gone = removal.removed(parent)
    found = [path.parent for path in parent.glob(f"*/{file}")]
    return sorted(path for path in found if path.name not in gone and not removal.TRASH.fullmatch(path.name))


def stores(root: Path) -> list[Store]:
    """All stores of a cache."""
    return [kind(path) for name, kind in kinds().items() for path in folders(root, name)]


def without_recipe(root: Path) -> list[Path]:
    """Folders that hold committed windows but no recipe: no store any more. Not those being removed right now."""
    held_rows = [path for kind in kinds() for path in holding(root / kind, MANIFEST)]
    return [path for path in held_rows if not (path / RECIPE).exists() and not held(path)]


def readable(root: Path, paths: Sequence[Path] | None = None) -> tuple[list[Store], list[str]]:
    """The stores at `paths` (all of a cache, where not given) that can be opened, and what is wrong with the others."""
    found: list[Store] = []
    damage = [] if paths is not None else [f"{path / RECIPE}: missing{REMEDY}" for path in without_recipe(root)]
    for path in [p for kind in kinds() for p in folders(root, kind)] if paths is None else paths:
        try:
            found.append(opened(path))
        except DamagedStore as error:
            damage.append(str(error))
    return found, damage


def entry(store: Store) -> Entry:
    """Return the line of a store in a list."""
    slug = store.slug
    size = store.manifest.stored_bytes
    return Entry(store.key, store.kind, slug, store.n_rows, size, str(store.path), store.complete)


def unfinished(store: Store) -> str:
    """Return the words that follow the key of a store that is not complete."""
    return "" if store.complete else f" (unfinished: {store.n_rows:,} rows; the command that made it continues it)"


def find(root: Path, kind: type[AnyStore], name: str | None, argument: str | None = None) -> AnyStore:
    """The one training store `name` means; without a name, that of the last call that made one.

    argument: which one named it, where that is not the usual one.

    Raises NotFound with what to run, or SaeError listing the candidates.
    """
    usual, make = FOUND_BY[kind.kind]
    said = f"{argument or usual} = {'...' if name is None else name}"
    known = folders(root, kind.kind)
    if name == "":
        raise SaeError(f"{argument or usual} = '': is the beginning of every key; `stores()` lists them")
    if name is not None and (parse_path(name) / RECIPE).exists():
        matches = [parse_path(name)]
    elif name is not None:
        exact = [path for path in known if path.name == name]
        matches = exact or _meant([path for path in known if path.name.startswith(name)])
        if not matches:
            there = listed(known) or f"nothing yet; run `{make}()`"
            raise NotFound(f"{said}: no such store in {root / kind.kind}; there is {there}")
    else:
        matches = [root / kind.kind / key for key in latest(root).get(kind.kind, []) if root / kind.kind / key in known]
        matches = matches or known
        if not matches:
            raise NotFound(f"{root / kind.kind}: no store yet; run `{make}()` first")
    training = [path for path in matches if _for_training(path)]
    if not training:
        kept = f"{listed(matches)} holds documents kept for judging"
        raise SaeError(
            f"{argument} = {name or '...'}: {kept}; name the store of the training documents, this one goes with it"
        )
    if len(training) > 1:
        raise SaeError(f"{said}: ambiguous; matches {listed(training)}")
    return kind(training[0])


def any_store(root: Path, name: str) -> Store:
    """The one store of any kind that `name` means."""
    return opened(located(root, name))


def located(root: Path, name: str) -> Path:
    """Return the folder of the one store that `name` means; it need not be readable."""
    if not name:
        raise SaeError("the name of a store is empty; `stores()` lists the keys")
    every = [path for kind in kinds() for path in folders(root, kind)]
    if (parse_path(name) / RECIPE).exists():
        matches = [as_named(parse_path(name))]
    else:
        exact = [path for path in every if path.name == name]
        begun = [path for path in every if path.name.startswith(name)]
        matches = exact or _meant(begun)
    if not matches:
        raise NotFound(f"{name}: no such store in {root}; there is {listed(every) or 'nothing yet'}")
    if len(matches) > 1:
        raise SaeError(f"{name}: ambiguous; matches {listed(matches)}")
    return matches[0]


def opened(path: Path, manifest: Manifest | None = None) -> Store:
    """The store in a folder, of whatever kind it says it is (with `manifest` in the place of its own)."""
    kind = read_head(path).kind
    if kind not in kinds():
        raise SaeError(f"{path}: holds {kind}, of which this version knows nothing; use the one that wrote it")
    return kinds()[kind](path, manifest)


def of_recipe(root: Path, kind: type[AnyStore], recipe: Recipe) -> AnyStore | None:
    """The store a recipe describes, or None where it was never made."""
    for path in folders(root, kind.kind):
        if path.name.endswith(digest(recipe)):
            found = kind(path)
            if canonical(found.recipe) != canonical(recipe):
                raise SaeError(f"{path}: holds another recipe of the same hash; remove it (`remove()`)")
            return found
    return None


def sibling_of(root: Path, store: AnyStore, split: str) -> AnyStore | None:
    """The store of the same recipe for the other documents, or None where it was never made."""
    return of_recipe(root, type(store), sibling(store.recipe, split))


def latest(root: Path) -> dict[str, list[str]]:
    """Keys of the training stores the last command of each kind made."""
    path = root / LATEST
    data = read(path, MOST_BYTES)
    try:
        said = {} if data is None else parsed_mapping(data)
        return {name_of_file({"kind": kind}, "kind"): _keys(keys) for kind, keys in said.items()}
    except ValueError as error:
        raise DamagedStore(
            f"{path}: is not the JSON that was written; remove the file and name the store you mean"
        ) from error


def _keys(said: Any) -> list[str]:
    if not isinstance(said, list):
        raise ValueError(f"{shown(said)} where a list of keys should be")
    return [name_of_file({"key": key}, "key") for key in said]


def remember(root: Path, kind: str, keys: Sequence[str]) -> None:
    """Note what the last command of a kind made."""
    write_atomic(root / LATEST, json.dumps({**latest(root), kind: list(keys)}, indent=2).encode())


def as_named(path: Path) -> Path:
    """The path without links on the way, but as it is called where it is a link itself."""
    if is_remote(path):
        return path
    path = Path(os.path.abspath(path))
    return path.parent.resolve() / path.name


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder."""
    return removal.size(folder)


def runs(root: Path) -> list[Run]:
    """All runs of dictionaries, oldest first. Raises DamagedStore where one cannot be read."""
    found, damage = readable_runs(root)
    if damage:
        raise DamagedStore(f"{damage[0]}; name the run that you mean")
    return found


def readable_runs(root: Path, *, all_tools: bool = False, decompositions: bool = False) -> tuple[list[Run], list[str]]:
    """The runs of dictionaries that can be read, oldest first, and what is wrong with the others.

    decompositions: whether runs of these are wanted, too. A folder whose config.json is of something else is another
    tool's, and left out unless `all_tools`.
    """
    found, damage = [], []
    paths = [path / CONFIG for path in holding(root, CONFIG)]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            run = Run(path.parent)
            if not run.foreign:
                _ = run.settings, None if run.decomposes else run.seen
            if (all_tools or not run.foreign) and (decompositions or not run.decomposes):
                found.append(run)
        except SaeError as error:
            damage.append(str(error))
    return found, damage


def trained_on(root: Path, seen: SeenStore, run: str, given: str | None) -> ActivationStore:
    """A store that a run was trained on: the one `given`, else that of the recipe which the run names.

    A path or a URL is only ever what the user gives, never what a run says.
    """
    if given is None and seen.key not in {path.name for path in folders(root, ActivationStore.kind)}:
        raise NotFound(f"{seen.key}: {run} was trained on it, but it is not in {root}; say `activations`")
    name = given if given is not None else str(root / ActivationStore.kind / seen.key)
    return find(root, ActivationStore, name)


def find_run(root: Path, name: str | None, *, decompositions: bool = False) -> Run:
    """The dictionary's run that `name` means (a name under `root`, or a path); without one, the newest finished one.

    Raises SaeError for a decomposition, which is none, unless `decompositions` are wanted, too.
    """
    if name is not None:
        run = _named_run(root, name)
        if run is None:
            there = ", ".join(run.name for run in readable_runs(root)[0]) or "nothing yet; run `train()`"
            raise NotFound(f"{name}: no such run in {root}; there is {there}")
        if run.decomposes and not decompositions:
            raise SaeError(
                f"{run.path}: is a decomposition of weights, no dictionary, so this cannot take it; its figures are "
                f"shown by `decompose(resume=True, name={run.name})`"
            )
        return run
    finished = [run for run in runs(root) if run.finished]
    if not finished:
        raise NotFound(f"{root}: no finished run; run `train()` first")
    return finished[-1]


def find_decomposition(root: Path, name: str) -> Run:
    """The decomposition's run that `name` means. Raises NotFound where there is none, SaeError for a dictionary's."""
    run = _named_run(root, name)
    if run is None:
        every = [run.name for run in readable_runs(root, decompositions=True)[0] if run.decomposes]
        raise NotFound(
            f"{name}: no such run in {root}; there is {', '.join(every) or 'nothing yet; run `decompose()`'}"
        )
    if not run.decomposes:
        raise SaeError(f"{run.path}: is a dictionary, no decomposition; choose another `name`")
    return run


def _named_run(root: Path, name: str) -> Run | None:
    """The run of a name under `root`, or of a path. Raises NotFound for the folder of another tool."""
    for path in (Path(name), root / name):
        if (path / CONFIG).exists():
            run = Run(path)
            if run.foreign:
                raise NotFound(f"{path}: is another tool's folder, no run; `adopt({path})` makes one of a dictionary")
            return run
    return None


def _meant(begun: Sequence[Path]) -> list[Path]:
    """Of the stores whose keys begin alike: those of training documents, and of these the finished ones, if any."""
    training = training_of(begun)
    return [path for path in training if _complete(path)] or training


def training_of(begun: Sequence[Path]) -> list[Path]:
    """Without the stores that only accompany another of these: its validation documents."""
    others = {path for path in begun if not _damaged(path) and not _for_training(path)}
    return [path for path in begun if path not in others] or list(begun)


def _damaged(path: Path) -> bool:
    try:
        read_head(path)
    except SaeError:  # whatever it is, it is not ruled out here; who opens it says what is wrong
        return True
    return False


def _complete(path: Path) -> bool:
    try:
        return opened(path).complete
    except SaeError:  # as above
        return False


def _for_training(path: Path) -> bool:
    recipe = read_head(path).recipe
    said = recipe if "split" in recipe else recipe.get("tokens")
    return not isinstance(said, dict) or said.get("split") == "train"  # what is no recipe is said later


def listed(paths: Sequence[Path]) -> str:
    """Names of stores, as a message lists them."""
    return ", ".join(path.name for path in paths)
