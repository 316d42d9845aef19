"""The files of a folder that are text: all of them, or those that a data set which lies there names.

Known are what `datasets` saves (`save_to_disk`) and clones of the Hugging Face hub's data sets. Of several splits the
training one is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sae.cache.errors import SaeError
from sae.pipeline.tokenize.sources.opened import File

_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`
_DESCRIPTIONS = {_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json"}
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?=[/_.-])")
TRAIN = "train"


def texts_in(spec: str, folder: Path) -> list[File]:
    """Every file below a folder that may be text, hidden ones and descriptions aside, in order."""
    splits = _described(folder / _SPLITS).get("splits")
    if isinstance(splits, list):
        split = _one_of(spec, [str(one) for one in splits], f"{spec}/SPLIT")
        return [File(f"{split}/{file.name}", file.path) for file in texts_in(spec, folder / split)]
    state = _described(folder / _STATE)
    if "_data_files" in state:
        return _saved(spec, folder, state)
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    files = sorted(File(name.as_posix(), folder / name) for name in names if name.name not in _DESCRIPTIONS)
    return _training(spec, files) if _is_clone(folder) else files


def _saved(spec: str, folder: Path, state: dict[str, Any]) -> list[File]:
    """The files of one data set that `save_to_disk` wrote, in its order."""
    if state.get("_indices_data_files"):
        raise SaeError(
            f"source = {spec}: is a selection of rows saved beside its data; load it with datasets and save what "
            "flatten_indices() gives"
        )
    try:
        names = [str(one["filename"]) for one in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise SaeError(f"source = {spec}: {_STATE} does not name its data files; save the data set again") from error
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise SaeError(f"source = {spec}: {missing}, which {_STATE} names, is not there; give a whole copy")
    return [File(name, folder / name) for name in names]


def _described(path: Path) -> dict[str, Any]:
    """Return the content of a description; nothing where it is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):  # some text of that name
        return {}
    return found if isinstance(found, dict) else {}


def _is_clone(folder: Path) -> bool:
    """Return True if a folder says of itself that it is a data set of the hub."""
    if (folder / "dataset_infos.json").is_file():
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    front = card.read_bytes().removeprefix(b"---").partition(b"\n---")[0] if card.read_bytes()[:3] == b"---" else b""
    return re.search(rb"^(dataset_info|configs):", front, re.MULTILINE) is not None


def _training(spec: str, files: list[File]) -> list[File]:
    """The files of the training split where names tell splits apart, of one configuration."""
    split_of = {file: match[1] for file in files if (match := _SPLIT.search(file.name))}
    splits = sorted(set(split_of.values()))
    if not splits:
        return files
    chosen = _one_of(spec, splits, f'"{spec}/**/SPLIT*"')
    kept = [file for file in files if split_of.get(file) == chosen]
    places = sorted({file.name.rpartition("/")[0] for file in kept})
    if len(places) > 1:
        raise SaeError(f"source = {spec}: holds {', '.join(places)}; give one of these folders")
    return kept


def _one_of(spec: str, splits: list[str], example: str) -> str:
    """The split that is read: the training one, or the only one."""
    if TRAIN in splits or len(splits) == 1:
        return TRAIN if TRAIN in splits else splits[0]
    raise SaeError(f"source = {spec}: holds the splits {', '.join(splits)}; give one of them, as {example}")
