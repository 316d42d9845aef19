"""A dictionary of another tool -> a run folder: judged, compared and reported like one that was trained here.

The folder holds the dictionary in the layout of any run, and names the activations that it is judged on: those of its
hook point, in the cache, where the tool's files say which that is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.cache import catalogue, points
from sae.cache.activations import ActivationStore
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import common_rows
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.run_folder import discarding
from sae.cache.runs import CONFIG, Run
from sae.cache.seen import Seen, SeenStore
from sae.pipeline import formats
from sae.pipeline.formats import saelens
from sae.pipeline.formats.located import located
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes.dictionary import Dictionary, Metadata

ALIASES = {"gpt2-small": "gpt2"}
"""Names of models that transformer_lens and SAELens have for themselves."""


def adopt(
    source: str, name: str, root: Path, runs: Path, progress: Progress, *, activations: str | None = None,
    target: str | None = None, offline: bool = False,
) -> Run:  # fmt: skip
    """Make a run, called `name`, of the dictionary that a folder, a file or a repository on the hub holds.

    `activations` (and `target`, for a transcoder) name the stores it is judged on, where those are not the ones of its
    hook points. Raises SaeError where it cannot be read, or there are no such stores.
    """
    where = located(source, offline=offline)
    format, (dictionary, metadata) = formats.detect(where).name, formats.read(where)
    dataset = _dataset(dictionary, metadata, source, root, progress, activations, target)
    stores = [SeenStore(store.key, store.recipe) for store in dataset.stores]
    seen = Seen(dataset.n_rows, (stores[0],), tuple(stores[1:]))
    numbers = {name: value for name, value in dictionary.rule.values().items() if not isinstance(value, Tensor)}
    said: dict[str, Any] = {
        "format": format, "source": source, "model": metadata.model, "hook": metadata.hook,
        "sae": {"arch": dictionary.rule.name, "d_sae": dictionary.d_sae, **numbers},
    }  # fmt: skip
    run = _begun(runs / name, {"imported": said, **seen.as_json()})
    with discarding([run]), run.lock():
        run.save_weights(*saelens.written(dictionary.formula(), metadata))
    return run


def _begun(path: Path, content: dict[str, Any]) -> Run:
    """The run folder, new, or the one that an import was killed in."""
    if (path / CONFIG).exists():
        run = Run(path)
        if run.config == content and not run.finished:
            return run
    return Run.create(path, content)


def _dataset(
    dictionary: Dictionary, metadata: Metadata, source: str, root: Path, progress: Progress, given: str | None,
    target: str | None,
) -> Dataset:  # fmt: skip
    """Return the dataset that the dictionary is judged on: its inputs, and its targets where they are others."""
    if target is not None and not dictionary.is_transcoder:
        raise SaeError(f"target = {target}: {source} reconstructs what it reads; leave it out")
    wide = {"activations": dictionary.d_in, "target": dictionary.d_out}
    inputs = _store("activations", given, metadata.hook, metadata, source, root, wide)
    targets: tuple[ActivationStore, ...] = ()
    if dictionary.is_transcoder:
        targets = (_store("target", target, metadata.hook_out, metadata, source, root, wide, beside=inputs),)
    for argument, store, hook in zip(wide, (inputs, *targets), (metadata.hook, metadata.hook_out), strict=False):
        if store.d != wide[argument]:
            raise SaeError(
                f"{argument} = {store.key}: its rows have {store.d} values, and {source} has {wide[argument]}; name "
                "the store of its hook point"
            )
        for line in _differing(store, metadata.model, hook):
            progress.note(line)
    return Dataset.of((inputs,), targets, rows=common_rows((inputs, *targets)))


def _store(
    argument: str, given: str | None, hook: str | None, metadata: Metadata, source: str, root: Path,
    wide: dict[str, int], beside: ActivationStore | None = None,
) -> ActivationStore:  # fmt: skip
    """The store that is named, else the one of a hook point, of the same model and width."""
    if given is not None:
        return catalogue.find(root, ActivationStore, given, argument)
    point = None if hook is None else points.point_of_hook(hook)
    if point is None:
        what = "does not say of which point of a model it is" if hook is None else f"is of {hook}, no site of ours"
        raise SaeError(f"{source}: {what}; name the store that it is judged on with `{argument}`")
    if beside is not None:
        return points.aligned(root, beside, point, argument)

    def fits(store: ActivationStore) -> bool:
        return store.d == wide[argument] and not _differing(store, metadata.model, hook)

    try:
        return points.at_point(root, point, argument, fits)
    except NotFound:
        other = points.at_point(root, point, argument)  # raises NotFound, too, where there is none of that point at all
        differs = _differing(other, metadata.model, hook) or [f"{other.key}: has rows of {other.d} values"]
        raise SaeError(f"{source}: {differs[0]}; if it is the one, say `{argument} = {other.key}`") from None


def _differing(store: ActivationStore, model: str | None, hook: str | None) -> list[str]:
    """In what a store is not of the place that a dictionary says it is of, a line each."""
    origin = provenance(store.recipe)
    if not isinstance(origin, LanguageModelRows):
        return [] if hook is None else [f"{store.key}: comes from no language model, and the dictionary is of {hook}"]
    lines = []
    if model is not None and _plain(model) != _plain(origin.model):
        lines.append(f"{store.key}: is of the model {origin.model}, and the dictionary of {model}")
    if hook is not None and points.point_of_hook(hook) != (origin.layer, origin.site):
        lines.append(f"{store.key}: is of {origin.hook}, and the dictionary of {hook}")
    return lines


def _plain(model: str) -> str:
    """A model's name without its owner, as everybody calls it."""
    name = re.split(r"[/\\]", model.rstrip("/"))[-1].lower()
    return ALIASES.get(name, name)
