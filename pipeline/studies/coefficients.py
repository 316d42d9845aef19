"""What a penalty's weight buys: L1, Johnson-Lindenstrauss and both, over grids of coefficients, at equal rows.

All three on one convention, gpt_sae's, so that one axis means one thing: squared error averaged over features, latents
penalised over their row's norm. Inputs are scaled to mean square 1 (unless the settings say otherwise), so that a
coefficient means the same at every site. gpt_sae's 2,000 steps of warm-up are a share of the training here: of a
shorter run they would be all. The Johnson-Lindenstrauss weight falls from five times its coefficient, as there.

A dictionary with the Johnson-Lindenstrauss penalty alone is not sparse; its L0 is what it is.
"""

from collections.abc import Sequence
from pathlib import Path

from sae.cache.loader.dataset import Dataset
from sae.pipeline.report.compare import Row
from sae.pipeline.report.plots import pareto
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Lab, Result, Trial, of_equal_rows, variant
from sae.pipeline.train.stage import TrainConfig

L1_GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
JL_GRID = (0.05, 0.15, 0.5, 1.5, 5.0)
HYBRID_JL = (0.5,)
START = 5.0  # the Johnson-Lindenstrauss weight at the first step, in coefficients
WARMUP = 0.05  # share of the training

LABELS = ("paradigm", "l1_coefficient", "jl_coefficient")
FIRST = ("fvu", "l0", "dead_fraction", "jl")
ARCHITECTURES = ("l1", "jl", "hybrid")
ITSELF = tuple(
    f"sae.{name}"
    for name in ("penalty", "coefficient", "warmup", "jl_coefficient", "jl_start", "jl_warmup", "reduction")
)  # settings that the grids and the common convention decide


def coefficients(
    base: TrainConfig, dataset: Dataset, lab: Lab, *, l1: Sequence[float] = L1_GRID,
    jl: Sequence[float] = JL_GRID, hybrid_jl: Sequence[float] = HYBRID_JL, d_sae: int | None = None,
    seeds: int = 1,
) -> Result:  # fmt: skip
    """The ablation: a run for every L1 coefficient, every JL coefficient, and every L1 one beside every `hybrid_jl`.

    d_sae: number of latents, in the place of the base's.
    """
    trials = trials_of(of_equal_rows(base, [dataset]), dataset, l1, jl, hybrid_jl, d_sae)
    rows = lab.rows([seeded for trial in trials for seeded in trial.seeded(seeds)])
    return Result("coefficients", LABELS, columns(*FIRST), rows, draw)


def trials_of(
    base: TrainConfig, dataset: Dataset, l1: Sequence[float], jl: Sequence[float], hybrid_jl: Sequence[float],
    d_sae: int | None,
) -> list[Trial]:  # fmt: skip
    """Every dictionary of the ablation, with one seed."""
    size = {} if d_sae is None else {"d_sae": d_sae}

    def trial(arch: str, c: float | None, j: float | None) -> Trial:
        penalty = {} if c is None else {"penalty": "per_token", "coefficient": c, "warmup": WARMUP}
        spread = {} if j is None else {"jl_coefficient": j, "jl_start": START * j, "jl_warmup": WARMUP}
        config = variant(base, arch, **penalty, **spread, **size, reduction="mean_d")
        return Trial(dict(zip(LABELS, (arch, c, j), strict=True)), config, dataset)

    return [
        *(trial("l1", c, None) for c in l1),
        *(trial("jl", None, j) for j in jl),
        *(trial("hybrid", c, j) for j in hybrid_jl for c in l1),
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """L0 against FVU and against the cross-entropy added, a curve a paradigm."""
    pareto([{**row, "sae.arch": row["paradigm"], "train_fvu": None, "train_l0": None} for row in rows], path)
