"""Four ways to take one MLP apart, at equal parameters: what each costs, and what is left of the model.

    transcoder   sparse latents of what the MLP reads, which give what it gave
    molt         a sparse mixture of linear transforms of it, steered to as many transforms a row as those have latents
    sae          sparse latents of what it gave, which give it again
    spd          its own matrices as sums of components, of which those alone are on that are active

Active parameters are those of the latents or components that are on for a row: what they read by and write with. They
are the one axis that all share: an L0 of components of three matrices is another number than one of latents.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from sae.cache import catalogue, points
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, EVALUATION
from sae.cache.tokens import TokenStore
from sae.pipeline.decompose import folder, opening
from sae.pipeline.decompose.config import LocalConfig
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.decompose.predictor import ActiveMLP
from sae.pipeline.decompose.stage import decompose
from sae.pipeline.decompose.subjects import LocalMLP
from sae.pipeline.evaluate.judging import Evaluation, judge
from sae.pipeline.language_model.hints import boot
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.saes.molt import MOLTConfig
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Setup, Study, of_equal_rows, register, variant
from sae.pipeline.studies.tables import Result

ACTIVE = "active_parameters"


@register
class Mlp(Study):
    """One MLP taken apart by transcoders, mixtures of transforms, autoencoders, and decomposition of its weights.

    All have equally many parameters.

    Examples:

        sae study mlp --ks 8,16,32,64 --d-sae 1024
        sae study mlp --importances 1e-3,3e-3,1e-2 --no-ce
    """

    name = "mlp"
    labels = ("method", "k", "importance")
    shown = ("fvu", "ce_degradation", "l0", ACTIVE, "parameters")
    decides = ("sae.arch", "sae.k", "sae.d_sae")
    architectures = ("topk", "molt")
    dictionary = ("d_sae",)
    any_store = True

    ks: tuple[PositiveInt, ...] = Field(
        (8, 16, 32, 64), description="active latents of transcoders and autoencoders, active transforms of mixtures"
    )
    importances: tuple[NonNegativeFloat, ...] = Field(
        (1e-3, 3e-3, 1e-2), description="weights of importances of the decompositions"
    )
    spd_lr: PositiveFloat = Field(1e-3, description="learning rate of the decompositions")

    def trials(self, setup: Setup) -> list[Trial]:
        """The dictionaries: of what the MLP reads and gives, and of what it gives. The mixtures come last."""
        dataset, budget = setup.dataset, _budget(setup)
        both = (("transcoder", dataset), ("sae", Dataset.of(dataset.targets[0], rows=dataset.n_rows)))
        found = []
        for method, rows in both:
            each = rows.d_in + rows.d_out
            for k in self.ks:
                config = variant(setup.base, "topk", k=k, d_sae=budget // each)
                found.append(Trial({"method": method, "k": k, "importance": None}, config, rows))
        counts = transforms(budget, dataset.d_in, dataset.d_out)
        for k in (k for k in self.ks if k < sum(counts)):
            config = variant(setup.base, "molt", counts=counts, target_l0=k)
            found.append(Trial({"method": "molt", "k": k, "importance": None}, config, dataset))
        return found

    def run(self, setup: Setup) -> Result:
        dataset = mlp_dataset(setup.lab.place.cache, setup.dataset.inputs[0])
        setup = replace(setup, dataset=dataset, base=of_equal_rows(setup.base, [dataset]))
        trials = self.trials(setup)
        rows = []
        for row, trial in zip(self.rows(setup, trials), _seeded(trials, setup), strict=True):
            d_in, d_out, sae = trial.dataset.d_in, trial.dataset.d_out, trial.config.sae
            own = sae.numbers(d_in, d_out) if isinstance(sae, MOLTConfig) else sae.latents * (d_in + d_out)
            rows.append({**row, "parameters": own})
        for seed in range(setup.base.seed, setup.base.seed + (setup.seeds or self.usual_seeds)):
            rows += [self._decomposed(setup, importance, seed) for importance in self.importances]
        most = sum(transforms(_budget(setup), dataset.d_in, dataset.d_out))
        notes = [
            f"molt: of {most} transforms {k} are no few, so there is none with k = {k}" for k in self.ks if k >= most
        ]
        return Result(self.name, self.labels, columns(*self.shown), rows, self.draw, notes)

    def _decomposed(self, setup: Setup, importance: float, seed: int) -> Row:
        """The row of a decomposition: as many components as come to the budget, gates included."""
        lab, dataset, base = setup.lab, setup.dataset, setup.base
        place = lab.place
        usual = LocalConfig()
        opened = opening.local(usual.model_copy(update={"batch": base.batch}), dataset, place, lab.model(dataset))
        subject = opened.opener({})
        assert isinstance(subject, LocalMLP)
        each = sum(sum(weight.shape) + 3 * usual.gate_hidden + 1 for weight in subject.matrices.values())
        count = max(1, _budget(setup) // each)
        config = LocalConfig(
            components=count, importance=importance, seed=seed, batch=base.batch, lr=self.spd_lr,
            steps=base.total_steps(dataset.n_rows), log_every=base.log_every, checkpoint_every=base.steps_to_checkpoint,
        )  # fmt: skip
        name = folder.run_name(config, opened.about)
        there = (place.runs / name / CONFIG).exists()
        run = folder.open_run(config, opened.about, place.runs, name, resume=there)
        decompose(run, config, lambda _: LocalMLP(config, dataset, lab.model(dataset)), place.progress)
        labels = {"method": "spd", "k": None, "importance": importance}
        judged, asked = run.evaluation() or {}, lab.eval_config
        wanted = {"rows": str(asked.rows), "tokens": str(asked.tokens), "cross_entropy": lab.cross_entropy}
        if (judged.get("details") or {}).get("asked") != wanted:
            found = _judged(lab, dataset, folder.load(run), config)
            found.details["asked"] = wanted
            judged = found.as_json()
            run.write_json(EVALUATION, judged)
        figures = {key: judged.get(key) for key in (*columns(*self.shown), "rows", "tokens")}
        return {"run": run.name, **labels, "seed": seed, **figures, "parameters": count * each}

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        def panel(y: str, x: str, title: str) -> Panel:
            curves: dict[str, list[tuple[float, float | None]]] = {}
            for row in sorted((row for row in rows if row[x]), key=lambda row: row[x]):
                curves.setdefault(row["method"], []).append((row[x], row[y]))
            return Panel(label(y), title, curves, log_x=True)

        active = "parameters that are active for a row"
        panels = [panel("fvu", ACTIVE, active), panel("ce_degradation", ACTIVE, active), panel("fvu", "l0", "L0")]
        draw_panels(panels, path)


def mlp_dataset(root: Path, reference: ActivationStore) -> Dataset:
    """What the MLP of a store's layer read and gave. Raises NotFound where one of the two is missing."""
    if (of := points.point_of(reference)) is None:
        raise SaeError(f"activations = {reference.key}: is of no layer of a model; name a store of an MLP's layer")
    reads, writes = (points.aligned(root, reference, (of[0], site), "activations") for site in ("mlp_in", "mlp_out"))
    return Dataset.of(reads, writes)


def transforms(budget: int, d_in: int, d_out: int) -> tuple[int, ...]:
    """How many transforms of each of the usual ranks come to so many parameters at most: a multiple of the usual."""
    usual = MOLTConfig()
    times = max(1, budget // usual.numbers(d_in, d_out))
    return tuple(times * count for count in usual.counts)


def _budget(setup: Setup) -> int:
    """Parameters of each method: those of a transcoder with the width that was asked for."""
    wide = setup.sae.get("d_sae") or setup.base.sae.model_dump()["d_sae"]
    return int(wide) * (setup.dataset.d_in + setup.dataset.d_out)


def _seeded(trials: Sequence[Trial], setup: Setup) -> list[Trial]:
    """The trials as `Study.rows` gives their rows: each with all of its seeds."""
    return [one for trial in trials for one in trial.seeded(setup.seeds or Mlp.usual_seeds)]


def _judged(lab: Lab, dataset: Dataset, decomposition: Decomposition, config: LocalConfig) -> Evaluation:
    """The evaluation of a decomposed MLP with its active components alone, on rows and spliced into the model.

    It runs in a copy of the model of its own, for it is asked for in the midst of the other's passes.
    """
    place, held_out = lab.place, dataset.held_out(lab.place.cache)
    tokens = model = None
    if lab.cross_entropy and held_out.provenance.text is not None:
        tokens = catalogue.of_recipe(place.cache, TokenStore, held_out.provenance.text.recipe)
        assert tokens is not None, "as `Lab.train` has seen"
        model = lab.model(dataset)
    with said_if_slow(place.progress, "loading the language model once more"):
        own = boot(dataset.inputs[0], None, place.device, place.offline)
    subject = LocalMLP(config, dataset, own)
    predictor = ActiveMLP(decomposition.to(own.device), subject, config.threshold)
    asked = lab.eval_config.model_copy(update={"dead_rows": 0})  # each row is a pass through a layer
    return judge(Subject(predictor), dataset, held_out, asked, place.progress, tokens=tokens, model=model)
