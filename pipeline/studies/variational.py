"""Sparse autoencoders against variational ones: true features that are found, and what becomes of pairs of them.

A KL's coefficient and an L1 penalty's are weights of different things, so dictionaries are not compared at equal ones:
L0 is set against FVU. Variational dictionaries are trained twice. With a TopK head they have the L0 of the others; as
they come, with several weights of the KL, their L0 is what it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from sae.cache.runs import Run
from sae.pipeline.metrics.figures import label
from sae.pipeline.report.compare import Row
from sae.pipeline.report.plots import pareto
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.study import Setup, Study, of_equal_rows, register, variant
from sae.pipeline.studies.tables import Result

Kind = Literal["topk", "l1", "vsae_iso", "vsae_mix", "vsae_multi"]
PAIRS = ("correlated_pairs", "anticorrelated_pairs")  # settings of the mixture, which a toy's rows say themselves
CHANCE = ("merged_pairs_chance", "alike_pairs")  # of what random directions, or any, would score
JUDGED = ("fvu", "true_to_learned", "merged_pairs")


@register
class SAEsAndVariational(Study):
    """Sparse autoencoders (TopK, L1) against variational ones, with a TopK head at the same L0 and as they come.

    Meant for rows of a toy whose features come in pairs, which say how many there are to the mixture's prior. Three
    dictionaries of each kind, unless `--seeds` says otherwise.

    Examples:

        sae study variational
        sae study variational --ks 3,5,8 --kl 0.01,0.1 --seeds 5
    """

    name = "variational"
    labels = ("dictionary", "k", "kl")
    shown = (
        "fvu", "l0", "true_to_learned", "chance", "recovered", "coefficient_r", "merged_pairs", *CHANCE, "cross_talk",
    )  # fmt: skip
    decides = ("sae.arch", "sae.k", "sae.target_l0", "sae.coefficient", "sae.kl_coefficient")
    architectures = ("topk", "l1", "vsae_iso", "vsae_mix", "vsae_multi")
    dictionary = ("d_sae",)
    usual_seeds = 3

    dictionaries: tuple[Kind, ...] = Field(
        ("topk", "l1", "vsae_iso", "vsae_mix", "vsae_multi"), min_length=1, description="architectures side by side"
    )
    ks: tuple[PositiveInt, ...] = Field((4, 8), description="active latents a row that all are trained at")
    kl: tuple[NonNegativeFloat, ...] = Field(
        (0.01, 0.3), description="weights of the KL of variational dictionaries without a head"
    )
    head_kl: float = Field(0.01, ge=0, description="weight of the KL of those with a head")

    def trials(self, setup: Setup) -> list[Trial]:
        made_by = setup.dataset.written[0].recipe.get("source")
        pairs = {name: made_by[name] for name in PAIRS if name in made_by} if isinstance(made_by, dict) else {}

        def trial(arch: Kind, k: int | None, kl: float | None) -> Trial:
            sae: dict[str, Any] = dict(setup.sae)
            if arch == "l1":
                sae["target_l0"] = float(k or 0)
            else:
                sae |= {"k": k} | ({} if kl is None else {"kl_coefficient": kl})
            config = variant(setup.base, arch, **sae, **(pairs if arch == "vsae_mix" else {}))
            return setup.trial(dict(zip(self.labels, (arch, k, kl), strict=True)), config)

        found = []
        for arch in self.dictionaries:
            weight = self.head_kl if arch.startswith("vsae") else None
            found += [trial(arch, k, weight) for k in self.ks]
            found += [trial(arch, None, kl) for kl in self.kl if weight is not None]
        return found

    def run(self, setup: Setup) -> Result:
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        rows = self.rows(setup, self.trials(setup))
        for row in rows:
            found = Run(setup.lab.place.runs / row["run"]).evaluation() or {}
            row |= {name: found.get(name) for name in CHANCE}
        return self.result(rows, notes=differences(rows))

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Write L0 against FVU, true features found and pairs merged, a colour a kind."""
        told = [
            {
                **row,
                "sae.arch": row["dictionary"] + ("" if row["k"] else ", no head"),
                "train_fvu": None,
                "train_l0": None,
            }
            for row in rows
        ]
        pareto(told, path, [name for name in JUDGED if any(row[name] is not None for row in rows)])


def differences(rows: Sequence[Row]) -> list[str]:
    """Say at each L0 by what each kind differs from TopK beyond the spread of its seeds, and where it does not."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["k"] is not None:
            groups.setdefault((row["dictionary"], row["k"]), []).append(row)
    notes = []
    for (kind, k), group in groups.items():
        reference = groups.get(("topk", k), [])
        if kind == "topk" or min(len(group), len(reference)) < 2:
            continue
        said = [told for name in JUDGED if (told := _difference(name, reference, group))]
        notes += [f"{kind} against topk, k {k}: {'; '.join(said)}"] if said else []
    return notes


def _difference(name: str, reference: Sequence[Row], group: Sequence[Row]) -> str | None:
    """In a figure: none where the means are no further apart than both standard deviations added."""
    one, other = ([row[name] for row in each if row[name] is not None] for each in (reference, group))
    if min(len(one), len(other)) < 2:
        return None
    apart, within = fmean(other) - fmean(one), stdev(one) + stdev(other)
    return f"{label(name)} {'no difference' if abs(apart) <= within else f'{apart:+.3g}'}"
