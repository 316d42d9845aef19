"""A finished run -> the dictionary it trained, and the dataset it was trained on."""

from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ValidationError
from torch import Tensor

from sae.cache import catalogue
from sae.cache.disk.parsing import figure, inner, text, whole
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import common_rows
from sae.cache.outliers import Limits
from sae.cache.runs import CHECKPOINT, CONFIG, Run
from sae.pipeline.formats import saelens
from sae.pipeline.saes import ARCHITECTURES, SAE, Config, Predictor, Trainable, TrainableConfig, parse, trainable
from sae.pipeline.saes.contract import LatentCoder
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary, Metadata


def dictionary_of(run: Run) -> TrainableConfig:
    """Return the settings of a run's dictionary. Raises DamagedStore, naming file and setting, where there are none."""
    try:
        return parse(run.settings.get("sae"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["train.sae", *map(str, first["loc"])])
        said = first["msg"].removeprefix("Value error, ")
        raise DamagedStore(f"{run.path / CONFIG}: {where}: {said}; train again under another `name`") from error


class Described(NamedTuple):
    """A dictionary as a page shows it: its architecture (if it is imported, its rule), its latents, and k if any."""

    arch: str
    d_sae: int
    k: int | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Describe the dictionary of a run. Raises DamagedStore where its config.json does not say."""
        if run.imported is None:
            config = dictionary_of(run)
            k = None if "k" in config.idle else getattr(config, "k", None)
            return cls(config.arch, config.latents_of(len(run.seen.inputs)), k)
        try:
            said = inner(run.imported, "sae")
            return cls(text(said, "arch"), whole(said, "d_sae", 1), whole(said, "k", 1) if "k" in said else None)
        except ValueError as error:
            raise DamagedStore(f"{run.path / CONFIG}: is not what was written ({error}); import it again") from error


def written(trained: Trainable, metadata: Metadata) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and cfg.json of what was trained: a dictionary as SAELens has it, anything else by its own names."""
    if isinstance(trained, SAE):
        return saelens.written(trained.formula(), metadata)
    tensors = {name: value.detach().contiguous() for name, value in trained.state_dict().items()}
    described = {"architecture": trained.config.arch, "d_in": trained.d_in, "d_out": trained.d_out}
    return tensors, described | ({"metadata": saelens.said_of(metadata)} if isinstance(trained, LatentCoder) else {})


def load_run(run: Run) -> Dictionary:
    """The dictionary of a finished run, in the data's units, ready to encode: an SAE, where it was trained here.

    Raises SaeError where another thing was trained, NotFound while training has not finished, DamagedStore where the
    weights do not fit the run's settings.
    """
    found = load_any(run)
    if not isinstance(found, Dictionary):
        read = (
            "`evaluate()` and `report()` alone read it"
            if isinstance(found, LatentCoder)
            else "only `evaluate()` reads it"
        )
        raise SaeError(f"{run.path}: trained a {dictionary_of(run).arch}, not a sparse dictionary; {read}")
    return found


def load_latents(run: Run) -> LatentCoder:
    """What a finished run trained, where its codes are latents that can be looked up; errors as in `load_run`."""
    found = load_any(run)
    if not isinstance(found, LatentCoder):
        arch = dictionary_of(run).arch
        raise SaeError(f"{run.path}: trained a {arch}, whose codes are no latents; only `evaluate()` reads it")
    return found


def load_any(run: Run) -> Predictor:
    """Load what a finished run trained or imported, in evaluation mode, without gradients; errors as in `load_run`."""
    tensors, described = run.load_weights()
    try:
        if run.imported is not None:
            fixed = FixedDictionary(saelens.formula_of(tensors, described))
            fixed.metadata = saelens.metadata_of(inner(described, "metadata"))
            return fixed
        config = dictionary_of(run)
        kind = ARCHITECTURES[config.arch]
        if not issubclass(kind, SAE) or not isinstance(config, Config):
            made = _blank(run, config)
            made.load_state_dict(tensors)
            if isinstance(made, LatentCoder):
                made.metadata = saelens.metadata_of(inner(described, "metadata") if "metadata" in described else {})
            return made.eval().requires_grad_(False)
        sae = kind.from_formula(config, saelens.formula_of(tensors, described))
        sae.metadata = saelens.metadata_of(inner(described, "metadata") if "metadata" in described else {})
    except SaeError:
        raise
    except (ValueError, RuntimeError) as error:
        raise DamagedStore(f"{run.path}: the weights do not fit the run's settings: {error}") from error
    return sae.eval().requires_grad_(False)


def _blank(run: Run, config: TrainableConfig) -> Trainable:
    """What a run trains, as it is before training."""
    inputs, targets = (tuple(recipe["d"] for recipe in side) for side in run.seen.recipes)
    return trainable(config, inputs, targets or None)


def in_training(run: Run) -> SAE | None:
    """The dictionary as training left it: in training's units, with what inference has no use for.

    It is in the checkpoint; None where there is none, or what was trained is no dictionary. DamagedStore where it is of
    other settings.
    """
    if run.imported is not None or not run.has_checkpoint:
        return None
    tensors, _ = run.load_checkpoint()
    made = _blank(run, dictionary_of(run))
    if not isinstance(made, SAE):
        return None
    try:
        made.load_state_dict({name: tensors[f"sae.{name}"] for name in made.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise DamagedStore(f"{run.path / CHECKPOINT}: is not of the run's settings: {error}") from error
    return made.eval().requires_grad_(False)


def dataset_of(run: Run, root: Path, activations: str | None = None) -> Dataset:
    """The dataset that a run was trained on, with all the rows there are now and the limits of the run.

    `activations` names the store of its (first) inputs, where that is not the one the run names; the others are beside
    it then.
    """
    first, *others = run.seen.stores
    store = catalogue.trained_on(root, first, run.name, activations)
    beside = store.path.parent.parent
    stores = (store, *(catalogue.trained_on(beside, one, run.name, None) for one in others))
    inputs, targets = stores[: len(run.seen.inputs)], stores[len(run.seen.inputs) :]
    found = Dataset.of(inputs, targets, rows=common_rows(stores))
    return found.kept_up_to(limits(run, found))


def expect_fits(dataset: Dataset, sae: Predictor, run: Run) -> None:
    """Raise SaeError unless a dictionary reads and writes rows as wide as a dataset's."""
    if (dataset.widths_in, dataset.widths_out) != (sae.widths_in, sae.widths_out):
        there, its = (" + ".join(map(str, widths)) for widths in (dataset.widths_in, sae.widths_in))
        raise SaeError(
            f"activations = {dataset.key}: its rows have {there} values, {run.name} reads {its}; "
            "give a store of the site it was trained on"
        )


def limits(run: Run, dataset: Dataset) -> Limits | None:
    """The norms above which a run left out rows of its dataset; None where all were trained on."""
    if run.seen.limits is not None or run.settings.get("outliers") == "auto":
        return run.seen.limits
    try:
        multiple = figure(run.settings, "outliers")
    except ValueError as error:
        raise DamagedStore(f"{run.path / CONFIG}: train.{error}; train again under another `name`") from error
    return dataset.limits_by(multiple)  # of a run of before the norms were recorded
