"""What becomes of a dictionary's latents when its language model is fine-tuned with an adapter (LoRA).

The adapter is merged into a copy of the model, which is saved in the folder of the runs (`adapted/`), loaded as any
other model, and read over the same tokens as the store given: its stores are named by the content of its weights.
Dictionaries of the base model are judged on it, latent by latent; dictionaries trained on it are compared with them,
beside the control that two seeds on the base model are alike by so much. An adapter that changes nothing leaves every
latent as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from sae.cache import catalogue
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.judging import judge
from sae.pipeline.formats import trained
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.metrics.similarity import chance, symmetric_mmcs
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.studies.adapted import Adapter, adapted_model, harvested
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import dots
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Setup, Study, expect_dictionary, of_equal_rows, register
from sae.pipeline.studies.tables import Result

ELEMENTS = 1 << 24  # latents of rows held at a time
PERSISTENCE = (
    "persistence_50",
    "persistence_90",
    "mean_correlation",
    "log_rate_ratio",
    "mmcs",
    "mmcs_control",
    "mmcs_chance",
)
LATENTS = 50  # that are named: gone, or new


@register
class Finetune(Study):
    """A dictionary's latents through fine-tuning: judged on the model with an adapter (LoRA), and on tokens alike.

    Needs the extra `lora`. The adapter is a folder that peft saved, or is trained here on a token store.

    Examples:

        sae study finetune --adapter my-adapter --d-sae 4096
        sae study finetune --corpus stories --adapter-steps 200
    """

    name = "finetune"
    labels = ("dictionary", "model")
    shown = ("fvu", "l0", "ce_recovered_zero", "dead_fraction")
    usual_seeds = 2
    any_store = True

    adapter: str | None = Field(None, description="folder of an adapter; null: one is trained here")
    corpus: str | None = Field(None, description="token store to train the adapter on; null: that of the activations")
    adapter_steps: int = Field(100, ge=0, description="steps of the adapter's training; 0: one that changes nothing")
    adapter_lr: PositiveFloat = Field(3e-4, description="learning rate of the adapter")
    rank: PositiveInt = Field(8, description="rank of the adapter")
    alpha: PositiveInt = Field(16, description="scale of the adapter, over its rank")
    contexts: PositiveInt = Field(8, description="contexts in a step of the adapter's training")

    def trials(self, setup: Setup) -> list[Trial]:
        """The dictionary of the base model."""
        return [setup.trial({"dictionary": "base", "model": "base"}, setup.base)]

    def run(self, setup: Setup) -> Result:
        expect_dictionary(setup.base)
        lab, seeds = setup.lab, setup.seeds or self.usual_seeds
        if seeds < 2:
            raise SaeError("seeds = 1: the control takes two dictionaries of the base model; train 2 seeds at least")
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        (store,) = setup.dataset.inputs
        folder, losses = adapted_model(self._adapter, store, lab)
        with said_if_slow(lab.place.progress, "loading the adapted model"):
            model = LanguageModel.boot(str(folder), device=lab.place.device, offline=True)
        adapted = harvested(store, model, folder, lab)
        base, again = (
            Trial({"dictionary": name, "model": name}, setup.base, dataset)
            for name, dataset in (("base", setup.dataset), ("adapted", adapted))
        )
        own, others = (trial.seeded(seeds) for trial in (base, again))
        rows = [{**row, **dict.fromkeys(PERSISTENCE)} for row in lab.rows(own)]
        runs = {trial.config.seed: Run(lab.place.runs / row["run"]) for trial, row in zip(own, rows, strict=True)}
        dictionaries = {seed: trained.load_run(run) for seed, run in runs.items()}
        latents: list[dict[str, Any]] = []
        for seed, run in runs.items():
            found, moved = _moved(dictionaries[seed], setup.dataset, adapted, lab)
            latents.append({"seed": seed, **moved})
            judged = _judged(dictionaries[seed], adapted, model, lab)
            rows.append({"run": run.name, "dictionary": "base", "model": "adapted", "seed": seed, **judged, **found})
        retrained = lab.train(others)
        pairs = zip(others, retrained, strict=True)
        for i, (trial, run) in enumerate(pairs):
            sae = trained.load_run(run)
            seed, other = (
                trial.config.seed,
                own[(i + 1) % seeds].config.seed,
            )  # of unlike seeds: they do not start alike
            agree = {
                "mmcs": symmetric_mmcs(sae.W_dec, dictionaries[other].W_dec).item(),
                "mmcs_control": symmetric_mmcs(dictionaries[seed].W_dec, dictionaries[other].W_dec).item(),
                "mmcs_chance": chance(sae.d_sae, sae.d_sae, sae.d_out),
            }
            judged = _judged(sae, adapted, model, lab)
            labels = {"dictionary": "adapted", "model": "adapted"}
            rows.append({"run": run.name, **labels, "seed": seed, **judged, **dict.fromkeys(PERSISTENCE), **agree})
        extra = {"adapted": str(folder), "losses": losses, "latents": latents}
        return self.result(rows, *PERSISTENCE, extra=extra)

    @property
    def _adapter(self) -> Adapter:
        trained = self.adapter_steps, self.adapter_lr, self.rank, self.alpha, self.contexts
        return Adapter(self.adapter, self.corpus, *trained)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        named = [{**row, "of": f"{row['dictionary']} on {row['model']}"} for row in rows]
        titles = {name: label(name) for name in self.shown} | {
            "persistence_50": "latents with r > 0.5", "mmcs": "MMCS with the base", "mmcs_control": "MMCS of two seeds"
        }  # fmt: skip
        dots(named, "of", titles, path)


def _judged(sae: Dictionary, dataset: Dataset, model: LanguageModel, lab: Lab) -> dict[str, Any]:
    """The figures of a dictionary on the adapted model."""
    place = lab.place
    held_out = dataset.held_out(place.cache)
    text = held_out.provenance.text
    assert text is not None
    tokens = catalogue.of_recipe(place.cache, TokenStore, text.recipe)
    sae = sae.to(devices.resolve_device(place.device))
    spliced = model if lab.cross_entropy else None
    found = judge(Subject(sae), dataset, held_out, lab.eval_config, place.progress, tokens=tokens, model=spliced)
    return {name: found.figures.get(name) for name in (*columns(*Finetune.shown), "rows", "tokens")}


@torch.no_grad()
def _moved(sae: Dictionary, base: Dataset, adapted: Dataset, lab: Lab) -> tuple[dict[str, Any], dict[str, Any]]:
    """How latents do on the adapted model against the base, over the same held-out tokens: figures, and latents.

    Persistent is a latent whose activations correlate by more than 0.5 (0.9), among those that fire on the base model.
    """
    device = devices.resolve_device(lab.place.device)
    sides = [one.held_out(lab.place.cache) for one in (base, adapted)]
    stores = [one.inputs[0] for one in sides]
    rows = min(one.n_rows for one in sides)
    if not np.array_equal(stores[0].positions(0, rows), stores[1].positions(0, rows)):
        raise SaeError(
            f"{stores[1].key}: its rows are of other tokens than those of {stores[0].key}; remove and repeat"
        )
    sae = sae.to(device)
    sums = torch.zeros(7, sae.d_sae, dtype=torch.float64)  # a, b, aa, bb, ab, fired a, fired b
    step = max(1, min(4096, ELEMENTS // sae.d_sae))
    for at in range(0, rows, step):
        a, b = (sae.encode(one.read(at, min(at + step, rows)).to(device)).dense().double().cpu() for one in sides)
        sums += torch.stack(
            [a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (a * b).sum(0), (a != 0).sum(0), (b != 0).sum(0)]
        )
    first, second, aa, bb, ab, fired, after = sums
    cov, var_a, var_b = ab - first * second / rows, aa - first.square() / rows, bb - second.square() / rows
    alive = (fired > 0) & (var_a > 0)
    r = torch.where(alive & (var_b > 0), cov / (var_a * var_b).sqrt(), 0.0)[alive]
    both = alive & (after > 0)
    ratio = (after[both] / fired[both]).log2()
    gone, new = (alive & (after == 0)).nonzero().flatten(), ((fired == 0) & (after > 0)).nonzero().flatten()
    figures = dict.fromkeys(PERSISTENCE) | {
        "persistence_50": (r > 0.5).double().mean().item() if len(r) else None,
        "persistence_90": (r > 0.9).double().mean().item() if len(r) else None,
        "mean_correlation": r.mean().item() if len(r) else None,
        "log_rate_ratio": ratio.mean().item() if len(ratio) else None,
    }
    counts = torch.histc(ratio, 20, -5, 5).int().tolist()
    told = {
        "alive": int(alive.sum()), "gone": gone.tolist()[:LATENTS], "new": new.tolist()[:LATENTS],
        "gone_count": len(gone), "new_count": len(new), "correlations": [round(value, 6) for value in r.tolist()],
        "log2_rate_ratio": {"from": -5, "to": 5, "counts": counts},
    }  # fmt: skip
    return figures, told
