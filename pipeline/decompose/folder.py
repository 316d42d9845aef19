"""The run folder of a decomposition: its settings and subject, its components, and what was found of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache import catalogue
from sae.cache.disk.identity import digest
from sae.cache.disk.parsing import as_written, inner, text, whole
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.runs import CONFIG, DECOMPOSITION, WEIGHTS, WEIGHTS_CONFIG, Run
from sae.pipeline.decompose.components import components_of
from sae.pipeline.decompose.config import KINDS, DecomposeConfig
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.decompose.reading import Reading

ARCHITECTURE = "spd"

About = dict[str, Any]
"""What config.json says of the subject beside the settings: stores and model, with their recipes."""


def run_name(config: DecomposeConfig, about: About) -> str:
    """The name of a decomposition's run folder, where none is given."""
    identity = {"decompose": config.model_dump(mode="json"), **about}
    return f"{ARCHITECTURE}-{config.kind}-c{config.components}-s{config.seed}-{digest(identity)}"


def open_run(config: DecomposeConfig, about: About, root: Path, name: str | None, *, resume: bool) -> Run:
    """The run folder of a decomposition: new, or with `resume` the one of the same settings.

    Raises SaeError where a new one exists, NotFound where there is none to resume, SaeError where its settings differ.
    """
    content = {"decompose": config.model_dump(mode="json"), **about}
    name = name or run_name(config, about)
    if not resume:
        return Run.create(root / name, content)
    if not (root / name / CONFIG).exists():
        raise NotFound(
            f"resume = True: no run {name} in {root}; `choices()` shows the runs, without `resume` it is started"
        )
    run = catalogue.find_decomposition(root, name)
    saved, given = _as_now(run.settings), content["decompose"]
    differs = sorted(key for key in {*saved, *given} if saved.get(key) != given.get(key))
    differs += [key for key in about if run.config.get(key) != about[key]]
    if differs:
        raise SaeError(
            f"resume = True: {run.path} was started with other settings ({', '.join(differs)}); repeat those"
        )
    return run


def settings_of(run: Run) -> DecomposeConfig:
    """The settings of a decomposition's run. Raises DamagedStore where they are none of this version."""
    with as_written(run.path / CONFIG):
        kinds = {str(kind.model_fields["kind"].default): kind for kind in KINDS}
        kind = text(run.settings, "kind")
        if kind not in kinds:
            raise ValueError(f"kind is {kind}, not {', '.join(kinds)}")
        return kinds[kind].model_validate(_as_now(run.settings))


def _as_now(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of any version in today's words: at first all learned as fast, and nothing was tied."""
    before: dict[str, Any] = {"factor_rate": 1.0} | ({"tied": False} if settings.get("kind") == "toy" else {})
    return before | settings


def save(run: Run, decomposition: Decomposition, config: DecomposeConfig) -> None:
    """Write a finished decomposition, the matrices themselves included."""
    tensors = {
        f"{name}.{key}": value for name, part in decomposition.parts.items() for key, value in part.state_dict().items()
    }
    shapes = {name: [*part.weight.shape] for name, part in decomposition.parts.items()}
    said = {name: getattr(config, name) for name in ("components", "gate", "gate_hidden", "delta", "threshold")}
    run.save_weights(tensors, {"architecture": ARCHITECTURE, **said, "matrices": shapes})


def load(run: Run) -> Decomposition:
    """The decomposition of a finished run. Raises NotFound while training has not ended."""
    if not run.finished:
        raise NotFound(
            f"{run.path}: training has not finished; continue it with `decompose(resume=True, name={run.name})`"
        )
    tensors, said = run.load_weights()
    config = settings_of(run)
    weights = {}
    with as_written(run.path / WEIGHTS_CONFIG):
        for name in inner(said, "matrices"):
            weight = tensors.get(f"{name}.weight")
            if weight is None or weight.ndim not in (2, 3):
                raise ValueError(f"{WEIGHTS} lacks the matrix {name}")
            weights[name] = weight
        count, hidden = whole(said, "components", 1), whole(said, "gate_hidden", 1)
    decomposition = Decomposition(
        components_of(weights, config.transposes, count, config.gate, hidden, lambda _: torch.Generator())
    )
    fill(
        decomposition,
        {name: one for name, one in tensors.items() if not name.endswith(".weight")},
        str(run.path / WEIGHTS),
    )
    return decomposition


def trained(decomposition: Decomposition) -> dict[str, Tensor]:
    """The parameters, by the name of their matrix and their own; the matrices themselves are the model's."""
    return {
        f"{name}.{key}": value for name, part in decomposition.parts.items() for key, value in part.named_parameters()
    }


def fill(decomposition: Decomposition, tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors in the place of the parameters. Raises DamagedStore where they are not of these names and shapes."""
    mine = trained(decomposition)
    wrong = [name for name in {**mine, **tensors} if name not in mine or name not in tensors]
    wrong = wrong or [name for name, value in mine.items() if value.shape != tensors[name].shape]
    if wrong:
        raise DamagedStore(f"{where}: its {wrong[0]} is missing, unknown, or not that of the run's settings")
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(tensors[name])


def keep(run: Run, reading: Reading) -> None:
    """Write what was found of a decomposition, its figures last: their presence says that all is there."""
    run.save_latents(
        {f"{name}.{key}": one for name, fired in reading.fired.items() for key, one in fired._asdict().items()}
    )
    run.write_json(DECOMPOSITION, reading.figures)


def figures(run: Run) -> dict[str, Any] | None:
    """The figures of a decomposition; None where it has not been judged yet."""
    return run.read_json(DECOMPOSITION) if (run.path / DECOMPOSITION).exists() else None
