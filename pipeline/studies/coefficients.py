"""L1, Johnson-Lindenstrauss and both, over grids of coefficients, at equal rows.

All three on one convention, gpt_sae's, so that one axis means one thing: squared error averaged over features, latents
penalised over their row's norm. Inputs are scaled to mean square 1 (unless the settings say otherwise), so that a
coefficient means the same at every site. gpt_sae's 2,000 steps of warm-up are a share of the training here: of a
shorter run they would be all. The Johnson-Lindenstrauss weight falls from five times its coefficient, as there.

A dictionary with the Johnson-Lindenstrauss penalty alone is not sparse; its L0 is what it is.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, NonNegativeFloat

from sae.pipeline.report.compare import Row
from sae.pipeline.report.plots import pareto
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.study import Setup, Study, register, variant

START = 5.0  # the Johnson-Lindenstrauss weight at the first step, in coefficients
WARMUP = 0.05  # share of the training


@register
class Coefficients(Study):
    """What a penalty's weight buys: L1, Johnson-Lindenstrauss and both, over grids of coefficients, at equal rows.

    Examples:

        sae study coefficients --rows 50M
        sae study coefficients --l1 0.03,0.1,0.3 --jl 0.5,5 --hybrid-jl 0.05,0.5,5 --seeds 3
    """

    name = "coefficients"
    labels = ("paradigm", "l1_coefficient", "jl_coefficient")
    shown = ("fvu", "l0", "dead_fraction", "jl")
    decides = (
        "sae.penalty", "sae.coefficient", "sae.warmup", "sae.jl_coefficient", "sae.jl_start", "sae.jl_warmup",
        "sae.reduction",
    )  # fmt: skip
    architectures = ("l1", "jl", "hybrid")
    dictionary = ("d_sae",)

    l1: tuple[NonNegativeFloat, ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="L1 coefficients, also those of the hybrid"
    )
    jl: tuple[NonNegativeFloat, ...] = Field(
        (0.05, 0.15, 0.5, 1.5, 5.0), description="Johnson-Lindenstrauss coefficients"
    )
    hybrid_jl: tuple[NonNegativeFloat, ...] = Field(
        (0.5,), description="Johnson-Lindenstrauss coefficients of the hybrid, each beside every L1 one"
    )

    def trials(self, setup: Setup) -> list[Trial]:
        def trial(arch: str, c: float | None, j: float | None) -> Trial:
            penalty = {} if c is None else {"penalty": "per_token", "coefficient": c, "warmup": WARMUP}
            spread = {} if j is None else {"jl_coefficient": j, "jl_start": START * j, "jl_warmup": WARMUP}
            config = variant(setup.base, arch, **penalty, **spread, **setup.sae, reduction="mean_d")
            return setup.trial(dict(zip(self.labels, (arch, c, j), strict=True)), config)

        return [
            *(trial("l1", c, None) for c in self.l1),
            *(trial("jl", None, j) for j in self.jl),
            *(trial("hybrid", c, j) for j in self.hybrid_jl for c in self.l1),
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Write L0 against FVU and against the cross-entropy added, a curve a paradigm."""
        pareto([{**row, "sae.arch": row["paradigm"], "train_fvu": None, "train_l0": None} for row in rows], path)
