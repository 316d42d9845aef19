"""A finished run -> the dictionary it trained."""

from cache.activations import ActivationStore
from cache.errors import DamagedStore
from cache.outliers import largest_norm as multiple_of_norms
from cache.runs import Run
from pipeline.saes import ARCHITECTURES, SAE, parse


def load(run: Run) -> SAE:
    """The dictionary of a finished run, in the data's units, ready to encode.

    Raises NotFound while training has not finished, DamagedStore where the weights do not fit the run's settings.
    """
    tensors, _ = run.load_weights()
    config = parse(run.config["train"]["sae"])
    try:
        sae = ARCHITECTURES[config.arch].from_tensors(config, tensors)
    except ValueError as error:
        raise DamagedStore(f"{run.path}: the weights do not fit the run's settings: {error}") from error
    return sae.eval().requires_grad_(False)


def largest_norm(run: Run, store: ActivationStore) -> float | None:
    """The norm above which a run left out rows of its store; None where all were trained on."""
    multiple = run.config["train"].get("outliers")
    if run.largest_norm is not None or multiple is None:
        return run.largest_norm
    return multiple_of_norms(store, multiple)
