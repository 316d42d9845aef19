"""Dictionaries that are there already: of a run of ours, or in the files of another tool."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sae.cache import catalogue
from sae.cache.arguments import checked
from sae.cache.errors import NotFound
from sae.cache.runs import Run
from sae.pipeline import formats
from sae.pipeline.formats import trained
from sae.pipeline.formats.located import located
from sae.pipeline.runtime import devices
from sae.pipeline.saes.dictionary import Dictionary

Named = str | os.PathLike[str]
Device = str | torch.device


@checked
def load(run: Named | Run, *, runs: Named | None = None, device: Device = "cpu") -> Dictionary:
    """The dictionary of a finished run, ready to encode: in evaluation mode, without gradients, in the data's units.

    It is an `SAE` where it was trained here. `run` is a run folder, or its name in the folder `runs` (default:
    SAE_RUNS, else `runs` here). Raises NotFound where there is none or training has not finished, DamagedStore where
    its files are not those that were written.
    """
    if not isinstance(run, Run):
        run = _found(Path(run).expanduser(), runs_folder(runs))
    return trained.load_run(run).to(devices.resolve_device(device))


@checked
def read(source: Named, *, device: Device = "cpu", offline: bool = False) -> Dictionary:
    """The dictionary of another tool (SAELens, sparsify, ...), likewise ready; `metadata` says what of.

    `source` is a folder or file, or one in a repository on the hub: owner/name/folder@revision. It is in the units of
    that tool's data, in float32. Raises SaeError where there is none.
    """
    where = located(os.fspath(source), offline=offline)
    return formats.read(where).dictionary.to(devices.resolve_device(device))


def runs_folder(runs: Named | None) -> Path:
    """The folder of runs, where none is given the one that the command line would take."""
    return Path(runs if runs is not None else os.environ.get("SAE_RUNS") or "runs").expanduser()


def _found(name: Path, root: Path) -> Run:
    try:
        return catalogue.find_run(root, str(name))
    except NotFound as error:
        if name.is_dir():
            raise NotFound(f"{name}: is not a run of ours; sae.read opens dictionaries of other tools") from error
        raise
