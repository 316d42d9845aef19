"""A finished run -> the dictionary it trained."""

from pydantic import ValidationError

from sae.cache.activations import ActivationStore
from sae.cache.disk.parsing import inner
from sae.cache.errors import DamagedStore
from sae.cache.outliers import largest_norm as multiple_of_norms
from sae.cache.runs import CONFIG, Run
from sae.pipeline.formats import saelens
from sae.pipeline.saes import ARCHITECTURES, SAE, Config, parse


def dictionary_of(run: Run) -> Config:
    """What dictionary a run trains. Raises DamagedStore, naming its file and the setting, where there is no such."""
    try:
        return parse(run.settings.get("sae"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["train.sae", *map(str, first["loc"])])
        said = first["msg"].removeprefix("Value error, ")
        raise DamagedStore(f"{run.path / CONFIG}: {where}: {said}; train again under another --name") from error


def load(run: Run) -> SAE:
    """The dictionary of a finished run, in the data's units, ready to encode.

    Raises NotFound while training has not finished, DamagedStore where the weights do not fit the run's settings.
    """
    tensors, described = run.load_weights()
    config = dictionary_of(run)
    try:
        sae = ARCHITECTURES[config.arch].from_formula(config, saelens.formula_of(tensors, described))
        sae.metadata = saelens.metadata_of(inner(described, "metadata") if "metadata" in described else {})
    except ValueError as error:
        raise DamagedStore(f"{run.path}: the weights do not fit the run's settings: {error}") from error
    return sae.eval().requires_grad_(False)


def largest_norm(run: Run, store: ActivationStore) -> float | None:
    """The norm above which a run left out rows of its store; None where all were trained on."""
    multiple = run.settings.get("outliers")
    if run.largest_norm is not None or multiple is None:
        return run.largest_norm
    return multiple_of_norms(store, multiple)
