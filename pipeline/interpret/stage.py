"""Run folder + cache -> what is known of its latents, gathered once and read from the run folder ever after."""

from pathlib import Path
from typing import Any

import torch

from sae.cache import catalogue
from sae.cache.disk.durable import checksum, expect_no_link, expect_writable, read
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.provenance import LanguageModelRows
from sae.cache.runs import STATISTICS, WEIGHTS, WEIGHTS_CONFIG, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.formats import trained
from sae.pipeline.interpret.directions import lens
from sae.pipeline.interpret.gather import StatisticsConfig, gather, rows_of
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.interpret.statistics_file import described
from sae.pipeline.language_model import hints
from sae.pipeline.language_model.unembedding import unembedding
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.saes.dictionary import Dictionary

WRITES_TO_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
LENS_TOKENS = 10


def statistics_of(
    run: Run, root: Path, progress: Progress, *,
    config: StatisticsConfig | None = None, activations: str | None = None, device: str = "auto",
) -> Statistics:  # fmt: skip
    """What is known of the latents of a finished run: what its folder holds, else gathered now and put there.

    config: what has to be found; None: whatever there is of this dictionary will do, and the defaults where nothing is.
    Rows need not come from text: there are no contexts of those. The tokens that latents make likelier are added where
    the language model is on this machine, which is said where it is not.
    """
    weights = (read(run.path / name) or b"" for name in (WEIGHTS, WEIGHTS_CONFIG))
    dictionary = " ".join(checksum(data) for data in weights)
    there = described(run)
    if config is None and activations is None and there is not None and there.get("dictionary") == dictionary:
        found = Statistics.read(run)
        assert found is not None
        return found
    expect_no_link(run.path, STATISTICS)
    expect_writable(run.path / STATISTICS)
    where = devices.resolve_device(device)
    config = config or StatisticsConfig()
    dataset = trained.dataset_of(run, root, activations)
    sae = trained.load_latents(run).to(where)
    trained.expect_fits(dataset, sae, run)
    of = {"dictionary": dictionary, **_told(dataset, config)}
    found = Statistics.read(run) if there is not None and {**there, "begin": None} == {**of, "begin": None} else None
    gathered = found is None
    if found is None:
        found = gather(sae, dataset, _tokens(dataset, root), config, progress, device=where).said_of(of)
    elif found.lens is not None:
        return found
    made = _with_lens(found, sae, dataset, progress)
    if gathered or made is not found:
        made.write(run)
    return made


def _told(dataset: Dataset, config: StatisticsConfig) -> dict[str, Any]:
    """What statistics are computed from, beside the dictionary."""
    return {
        "stores": [store.key for store in dataset.stores],
        "split": dataset.split,
        "limits": None if dataset.limits is None else list(dataset.limits),
        "settings": {**config.gathered(), "rows": rows_of(dataset, config)},
    }


def _tokens(dataset: Dataset, root: Path) -> TokenStore | None:
    """The tokens that rows were harvested from; None where they come from no text."""
    text = dataset.provenance.text
    if text is None:
        return None
    tokens = catalogue.of_recipe(root, TokenStore, text.recipe)
    if tokens is None:
        raise NotFound(f"{root}: the tokens {dataset.key} was harvested from are gone; run `tokenize()` again")
    return tokens


def _with_lens(found: Statistics, sae: Any, dataset: Dataset, progress: Progress) -> Statistics:
    """Read decoder directions with the model's unembedding, where they are written to the residual stream."""
    origin = dataset.target_provenance
    if not isinstance(origin, LanguageModelRows) or not isinstance(sae, Dictionary) or len(dataset.written) > 1:
        return found
    if origin.site not in WRITES_TO_STREAM:
        return found
    store = dataset.written[0]
    try:
        with said_if_slow(progress, "reading the language model's unembedding"):
            name = hints.model_of(store, None, offline=True)
            weights = unembedding(name, store.recipe["model"]["revision"])
    except SaeError as error:
        progress.note(f"without the tokens that latents make likelier: {error}")
        return found
    if weights is None or weights.shape[1] != sae.W_dec.shape[1]:
        return found
    with torch.no_grad(), said_if_slow(progress, "reading latents with the unembedding"):
        return found.with_lens(lens(sae.W_dec, weights[: len(found.vocabulary)], LENS_TOKENS))
