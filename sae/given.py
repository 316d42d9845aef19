"""What a session is given, made into what stages take: folders, runs by their names, models, settings, texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from sae import configs
from sae.cache import catalogue
from sae.cache.disk.paths import parse_path
from sae.cache.errors import SaeError
from sae.cache.runs import Run
from sae.dictionaries import Named
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.probing.labelled import Labelled, TextSet, in_memory, sets_of
from sae.pipeline.runtime.progress import Progress, Silent

Kind = TypeVar("Kind", bound=BaseModel)
Runs = Sequence[Run | Named] | Run | Named


def settings(section: str, kind: type[Kind], preset: str | None, said: dict[str, Any]) -> Kind:
    """The settings of a stage. Raises SaeError naming the setting, its value and what to try."""
    return configs.resolve(section, kind, preset=preset, given=said)


def place(argument: str, said: Named) -> Path:
    """A folder, which need not be there, or a URL. Raises SaeError for what can be neither."""
    text = os.path.expanduser(os.fspath(said))
    if not text or "\0" in text:
        raise SaeError(f"{argument} = {text!r}: is not the name of a folder; give one")
    folder = parse_path(text)
    if folder.exists() and not folder.is_dir():
        raise SaeError(f"{argument} = {folder}: is a file, not a folder; name another")
    return folder


def told(wanted: bool | Progress) -> Progress:
    """Who is told how far things are: on stderr, nobody, or whoever is given."""
    if isinstance(wanted, Progress):
        return wanted
    if not wanted:
        return Silent()
    from sae.pipeline.commands.bars import Bars

    return Bars()


def expect_folder_name(name: str) -> None:
    """Raise SaeError for the name of a run that would not lie in the folder of runs."""
    if name in ("", "..") or Path(name).name != name:
        raise SaeError(f"name = {name!r}: is not the name of a folder; where the folder goes is said by `runs`")


def expect_workers(workers: int) -> None:
    """Raise SaeError for a number of processes that is none."""
    if workers < 1:
        raise SaeError(f"workers = {workers}: is no number of processes; give 1 for this one alone, or more")


def run_of(runs: Path, said: Run | Named | None, *, decompositions: bool = False) -> Run:
    """A run, itself or by its name or folder; without one, the newest finished one."""
    if isinstance(said, Run):
        return said
    return catalogue.find_run(runs, text_of(said), decompositions=decompositions)


def runs_of(runs: Path, said: Runs | None, *, decompositions: bool = False) -> list[Run]:
    """Runs, or one, likewise. Raises SaeError for an empty list."""
    one = said is None or isinstance(said, Run | str | os.PathLike)
    each: Sequence[Any] = [said] if one else said  # type: ignore[assignment]
    if not len(each):
        raise SaeError("runs: an empty list; name at least one")
    return [run_of(runs, run, decompositions=decompositions) for run in each]


def text_of(said: Named | None) -> str | None:
    """The name of something that may be a folder, where one is said."""
    return None if said is None else os.fspath(said)


def model_of(said: LanguageModel | Named | None) -> tuple[str | None, LanguageModel | None]:
    """The place of a language model, where one is said, or the model itself, where that is given."""
    return (None, said) if isinstance(said, LanguageModel) else (text_of(said), None)


def pair_of(rows: Any) -> tuple[Any, Any]:
    """Inputs and targets: of a pair both, of anything else none of the latter."""
    if not isinstance(rows, tuple):
        return rows, None
    if len(rows) != 2:
        raise SaeError(f"rows: a tuple of {len(rows)}; give a pair of inputs and targets (x, y), or rows alone")
    return rows


def texts_of(
    data: Any, sae_probes: Named | None, sets: Sequence[str] | None, columns: tuple[str, str]
) -> list[TextSet | Labelled]:
    """Labelled texts: of a file, of several, of {name: (texts, labels)}, of sae-probes. Raises SaeError for none."""
    files: Sequence[Any] = () if data is None or isinstance(data, Mapping) else data
    files = [files] if isinstance(files, str | os.PathLike) else files
    if not (isinstance(files, Sequence) and all(isinstance(one, str | os.PathLike) for one in files)):
        raise SaeError(f"data: is a {type(data).__name__}; give a file, several, or {{name: (texts, labels)}}")
    found: list[TextSet | Labelled] = []
    for name, pair in data.items() if isinstance(data, Mapping) else ():
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and not any(isinstance(one, str) for one in pair)):
            raise SaeError(f"data: what {name!r} has is no pair of lists; give {{name: (texts, labels)}}")
        found.append(in_memory(name, *pair))
    folder = None if sae_probes is None else Path(sae_probes).expanduser()
    found += sets_of([Path(one).expanduser() for one in files], folder, sets, columns)
    if not found:
        raise SaeError("data: no labelled texts; give a file, {name: (texts, labels)}, or `sae_probes`")
    return found
