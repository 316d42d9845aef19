"""Any dictionary, whoever trained it, judged on any rows that it fits."""

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.pipeline.evaluate.judging import EvalConfig, Evaluation, judge
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.worlds.making import making_of


def evaluate_dictionary(
    dictionary: Dictionary, dataset: Dataset, config: EvalConfig, progress: Progress, *, device: str
) -> Evaluation:
    """The figures of a dictionary on rows, those that are too massive to be trained on left out; it stays where it is.

    Raises SaeError where the rows are not such as it reads and writes.
    """
    if (dataset.d_in, dataset.d_out) != (dictionary.d_in, dictionary.d_out):
        raise SaeError(
            f"{dataset.key}: has rows of {dataset.d_in} values and targets of {dataset.d_out}; the dictionary "
            f"reads {dictionary.d_in} and writes {dictionary.d_out}"
        )
    dataset = dataset.kept_up_to(dataset.limits_by("auto"))
    here = dictionary.W_dec.device
    config = config.model_copy(update={"dead_rows": 0})  # there are no rows of its training to look for them in
    making = making_of((dataset.targets or dataset.inputs)[0])
    subject = Subject(dictionary.to(devices.resolve_device(device)), dataset.truth)
    judged = judge(subject, dataset, dataset, config, progress, making=making)
    dictionary.to(here)
    return judged
