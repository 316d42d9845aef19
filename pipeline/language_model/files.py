"""Files of a language model: in a local Hugging Face folder, the embedded model, or a hub repository.

Everything ends as one folder on disk holding `config.json` and safetensors weights, so that loading is one path and
needs no network. Pickled weights (`pytorch_model.bin`) are never opened; but transformer_lens' own models are published
in no other way (`lens_format`), and of their file weights alone are read. A hub model is named by its commit, a local
folder by the digest of what it holds.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.cache.errors import NotFound, SaeError
from sae.pipeline import embedded
from sae.pipeline.runtime.network import Refused, snapshot

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RANDOM = "random:"  # before a name: an untrained model of that shape
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
LENS_WEIGHTS = "model_final.pth"  # of transformer_lens' own models
LENS_MODELS = {f"gelu-{n}l": f"NeelNanda/GELU_{n}L512W_C4_Code" for n in (1, 2, 3, 4)}  # as it calls them, on the hub
WANTED = (CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", LENS_WEIGHTS)


_LARGEST_JSON = 2**26  # bytes


@dataclass(frozen=True)
class ModelFiles:
    """A folder with `config.json` and safetensors weights, and what names it."""

    name: str  # hub id, folder name, or tiny
    folder: Path
    revision: str | None = None  # the hub's commit; None for local folders

    @property
    def slug(self) -> str:
        """A short name fit for folders: `gpt2`, `Mistral-7B-v0.1`."""
        return slug(self.name)

    def weights(self) -> list[Path]:
        """The weight files, complete. Raises SaeError when there are none, or only pickled ones, or a shard lacks.

        Where there is a whole file and an index as well, it is the whole one, as in transformers.
        """
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        if self.of_lens:
            if not (self.folder / LENS_WEIGHTS).is_file():
                raise SaeError(f"model = {self.name}: no {LENS_WEIGHTS} in it; {self._remedy()}")
            return [self.folder / LENS_WEIGHTS]
        index = self.folder / INDEX
        if index.is_file():
            shards = sorted({self.folder / shard for shard in _read_index(index, self.name)})
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise SaeError(f"model = {self.name}: {shown(missing[0])} is missing; {self._remedy()}")
            return shards
        if any(path.suffix in PICKLES for path in self.folder.iterdir()):
            raise SaeError(
                f"model = {self.name}: only pickled weights ({', '.join(PICKLES)}), which are never opened; "
                "save the model again with save_pretrained, which writes model.safetensors"
            )
        raise SaeError(f"model = {self.name}: no {WEIGHTS} in it; {self._remedy()}")

    @property
    def of_lens(self) -> bool:
        """Return True if the folder is of a model in transformer_lens' own format."""
        return is_of_lens(read_json(self.folder / CONFIG, self.name))

    def digest(self) -> str:
        """sha256 over the names and contents of the configuration and the weight files."""
        files = [self.folder / CONFIG, *self.weights()]
        whole = hashlib.sha256()
        for path in sorted(files):
            with path.open("rb") as stream:
                whole.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()

    def _remedy(self) -> str:
        if self.revision is None:
            return "save the model again with save_pretrained"
        return "give a model that publishes safetensors, or run once with the network if the download was cut short"


def is_of_lens(config: dict[str, Any]) -> bool:
    """Return True if a configuration is in transformer_lens' words, and in none of transformers'."""
    return "model_type" not in config and {"d_model", "n_layers", "d_vocab"} <= config.keys()


def slug(name: str) -> str:
    """The last part of a name, with anything but letters, digits, dots, dashes and underscores made a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip("-.")


def one_line(error: BaseException) -> str:
    """The beginning of what an error says, in one line."""
    return shown(" ".join(str(error).split()), 300) or type(error).__name__


def shown(text: str, most: int = 100) -> str:
    """The beginning of a text that a stranger may have written, fit for a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[:most] + "..."


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises SaeError for anything else, or for keys that are there twice."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is too large")
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=object_of)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise SaeError(f"model = {name}: {path.name} is not understood: {one_line(error)}; save it again") from error
    return found


def find_model(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFiles:
    """Resolve a model name to files on disk, downloading from the hub unless `offline`.

    Raises NotFound or SaeError (one line, within seconds) when the name is unknown or cannot be reached.
    """
    if name == embedded.NAME:
        return _without_revision(ModelFiles(name, embedded.MODEL), revision)
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for a user who is not there
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise SaeError(f"model = {name}: the folder has no {CONFIG}; give a Hugging Face model folder")
        return _without_revision(ModelFiles(folder.resolve().name, folder), revision)
    name = LENS_MODELS.get(name, name)
    if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise NotFound(f"model = {name}: no such folder; give a Hugging Face model folder, a hub name, or tiny")
    return _from_hub(name, revision, offline)


def _without_revision(files: ModelFiles, revision: str | None) -> ModelFiles:
    if revision is not None:
        raise SaeError(f"revision = {revision}: {files.name} is a local folder; revisions are for hub models")
    return files


def _from_hub(name: str, revision: str | None, offline: bool) -> ModelFiles:
    """The hub's snapshot of a model: the newest when the hub answers, else the one in the local cache."""
    try:
        path = snapshot(name, WANTED, revision=revision, offline=offline)
    except Refused as error:
        what = f"{name} at revision {revision}" if revision else name
        remedy = "give a local Hugging Face folder, or `model = tiny` (embedded)"
        why = str(error) if error.definite else f"not, or not whole, in the local Hugging Face cache, and {error}"
        raise NotFound(f"model = {what}: {why}; {remedy}") from error
    if not (path / CONFIG).is_file():
        raise SaeError(f"model = {name}: the repository has no {CONFIG}; give a Hugging Face transformers model")
    return ModelFiles(name, path, revision=path.name)


def _read_index(index: Path, name: str) -> list[str]:
    """File names of the shards. Names with folders in them are refused."""
    shards = read_json(index, name).get("weight_map")
    if not shards or not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise SaeError(f"model = {name}: {INDEX} is not a list of weight files; save the model again")
    if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards.values()):
        raise SaeError(f"model = {name}: {INDEX} names files outside its folder, or no safetensors; save it again")
    return list(shards.values())
