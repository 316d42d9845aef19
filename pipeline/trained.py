"""A finished run -> the dictionary it trained."""

from cache.errors import DamagedStore
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
