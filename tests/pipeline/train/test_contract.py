"""An architecture is one file: a dictionary, a coder of another kind, or something that only predicts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]

DICTIONARY = '''
"""ReLU, and nothing else."""

from typing import Literal, final

from pydantic import Field

from .base import SAE, register
from .config import Config
from .inference import ReLURule


class PlainConfig(Config):
    """Plain."""

    arch: Literal["plain"] = Field("plain", description="architecture")


@final
@register
class Plain(SAE):
    """The plainest dictionary of all. Further sentences are not shown."""

    config_type = PlainConfig
    config: PlainConfig

    @property
    def rule(self) -> ReLURule:
        return ReLURule()
'''

CODER = '''
"""A linear autoencoder of a few directions, learned by gradient descent: its codes are no latents."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import register
from .config import FINISHED, Clock, Config
from .contract import Coder, Trainable
from .latents import Latents
from .losses import Losses, PlainLosses


class LinearConfig(Config):
    """Linear."""

    arch: Literal["linear"] = Field("linear", description="architecture")
    rank: int = Field(4, ge=1, description="directions")


@final
@register
class Linear(Coder, Trainable):
    """A few directions, of which each row has a sum."""

    config_type = LinearConfig
    config: LinearConfig

    def __init__(self, config: LinearConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed, self.d_in, self.d_out = config, seed, d_in, d_out or d_in
        random = torch.Generator().manual_seed(seed)
        self.reads = nn.Parameter(torch.randn(d_in, config.rank, generator=random) / d_in**0.5)
        self.writes = nn.Parameter(torch.randn(config.rank, self.d_out, generator=random) / config.rank**0.5)
        self.bias = nn.Parameter(torch.zeros(self.d_out))

    @property
    def width(self) -> int:
        return self.config.rank

    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        self.bias.data.copy_((sample if targets is None else targets).mean(0))

    def encode(self, x: Tensor) -> Latents:
        return Latents.of_dense(x @ self.reads)

    def decode(self, codes: Latents) -> Tensor:
        return codes.dense() @ self.writes + self.bias

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        y, y_hat = x if target is None else target, self(x)
        return PlainLosses({"reconstruction": (y_hat - y).square().sum(1).mean()}, clock, y_hat)
'''

PREDICTOR = (
    CODER.replace("linear", "affine").replace("Linear", "Affine").replace("(Coder, Trainable)", "(Trainable)")
    .replace("import Coder, Trainable", "import Trainable").replace("from .latents import Latents\n", "")
    .replace("    def encode(self, x: Tensor) -> Latents:\n        return Latents.of_dense(x @ self.reads)\n\n", "")
    .replace("def decode(self, codes: Latents)", "def forward(self, x: Tensor)")
    .replace("codes.dense()", "x @ self.reads")
    .replace("    @property\n    def width(self) -> int:\n        return self.config.rank\n\n", "")
)  # fmt: skip

SCRIPT = """
import json, sys
from pathlib import Path
from support.command_line import done, sae
import sae as package

assert Path(package.__file__).is_relative_to(Path.cwd()), package.__file__
known = {one["name"]: one["help"] for one in done("list --json").json["architectures"]}
assert known["plain"] == "The plainest dictionary of all" and {"linear", "affine"} <= known.keys(), known
assert "sae.rank" in done("list --settings").out or "rank" in done("list --settings --json").out
done("synthesize --d 8 --features 16 --groups 4 --active 2 --rows 1 --set synthesize.validation_rows=1 --codec float32")
small = "--device cpu --threads 1 --d-sae 16 --batch 128 --steps 40 --set train.log_every=10"
Path("linear.yaml").write_text("train: {sae: {arch: linear, rank: 3}, lr: 0.01}\\n")
for name, line in {
    "plain": f"--arch plain --lr 0.01 {small}", "linear": f"--config linear.yaml {small}",
    "affine": f"--arch affine --lr 0.01 {small}",
}.items():
    first = done(f"train {line} --name {name} --json").json
    assert first["step"] == 40 and first["fvu"] < 1.2, first
    assert ("l0" in first, "dead" in first, "recovery" in first) == ((name == "plain",) * 3), first
    found = done(f"eval {name} --json --device cpu --threads 1 --set eval.dead_rows=256").json
    assert abs(found["fvu"] - first["fvu"]) < 0.3, (name, found["fvu"], first["fvu"])
    assert (found["l0"] is not None, found["orthogonality"] is not None) == (name != "affine", name == "plain"), found
    assert found["rows"] > 0
rows = {row["run"]: row for row in done("compare --json --plot plot.png").json["runs"]}
assert {row["sae.arch"] for row in rows.values()} == {"plain", "linear", "affine"} == rows.keys()
assert rows["linear"]["fvu"] is not None and rows["linear"]["sae.rank"] == 3, rows
swept = done(f"train --arch linear {small} --sweep arch.rank=1,2 --seeds 2 --json").json["runs"]
assert len(swept) == 4
for line, says in {
    "train --arch linear --set train.revive.kind=resample": "train.revive.kind: arch linear is not a sparse dictionary",
    "train --arch affine --align dec --seeds 2": "train.align: arch affine is not a sparse dictionary",
}.items():
    answer = sae(f"{line} {small}")
    assert answer.code == 2 and says in answer.complaint, answer.err
try:
    package.load("linear")
except package.SaeError as error:
    assert "not a sparse dictionary" in str(error), error
else:
    raise AssertionError
assert package.load("plain").W_dec.shape == (16, 8)
demo = "--set tokenize.tokens=60000 --set tokenize.validation_tokens=4096 --set harvest.tokens=10000"
demo += " --set harvest.validation_tokens=4096 --set train.steps=10 --set train.batch=256 --set train.sae.d_sae=64"
demo += " --set eval.tokens=1024 --set eval.dead_rows=0 --device cpu --threads 1 --json"
page = done(f"demo --set train.sae.arch=plain {demo} --runs demo").json["report"]
assert "<b>plain</b> dictionary of <b>64 latents" in Path(page).read_text()
print("all seen")
"""


@pytest.mark.slow
def test_an_architecture_is_one_file(tmp_path: Path) -> None:
    """Three of them, put beside the others: listed, configured, trained, swept, evaluated, compared and reported."""
    shutil.copytree(PROJECT / "sae", tmp_path / "sae", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (("plain", DICTIONARY), ("linear", CODER), ("affine", PREDICTOR)):
        (tmp_path / "sae" / "pipeline" / "saes" / f"{name}.py").write_text(text)
    places = {
        "SAE_CACHE": str(tmp_path / "cache"), "SAE_RUNS": str(tmp_path / "runs"), "SAE_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PROJECT / "tests")]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True
    )
    assert found.returncode == 0 and found.stdout.endswith("all seen\n"), found.stderr[-3000:]
