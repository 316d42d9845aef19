"""Every format in its own tool's code, in an environment of the tool's own: what we write there, what it wrote here.

`make interop` builds the environments and runs this; SAE_INTEROP names the folder they are in. Numbers are compared
relative to the largest of them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.saes_kit import CASES, D, M, batches, made, one_thread, settings, train
from support.small_formats import D_OUT, K, rows
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline import formats
from sae.pipeline.formats import Metadata

pytestmark = pytest.mark.slow
single = pytest.fixture(autouse=True, scope="module")(one_thread)
SCRIPT = Path(__file__).parents[2] / "support" / "their_tools.py"
ENVIRONMENTS = {
    "saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify",
    "circuit-tracer": "circuit-tracer", "openmoss": "llamascopium",
}  # fmt: skip
THEIRS = {
    "saelens": ["standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk", "transcoder",
                "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"],
    "dictionary_learning": ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE",
                            "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"],
    "sparsify": ["topk", "topk skip", "transcoder", "skip transcoder"],
    "circuit-tracer": [],
    "openmoss": ["relu", "topk", "jumprelu", "relu by norm", "jumprelu by norm"],
}  # fmt: skip
MOST = 1e-5


class Table:
    """The largest deviation by tool, direction and what it was of."""

    def __init__(self) -> None:
        self.found: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)

    def add(self, tool: str, direction: str, what: str, ours: Tensor, theirs: np.ndarray) -> None:
        other = torch.from_numpy(theirs)
        assert other.shape == ours.shape
        off = float((ours - other).abs().max() / max(1.0, float(ours.abs().max())))
        self.found[tool, direction, what].append(off)
        assert off <= MOST, (tool, direction, what, off)


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found = Table()
    yield found
    lines = [f"{tool:20} {way:8} {what:28} {max(off):.1e}" for (tool, way, what), off in sorted(found.found.items())]
    if "SAE_INTEROP_TABLE" in os.environ:
        Path(os.environ["SAE_INTEROP_TABLE"]).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def tool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def python(tool: str) -> Path:
    """The tool's interpreter."""
    found = Path(os.environ.get("SAE_INTEROP", ".interop")).absolute() / ENVIRONMENTS[tool] / "bin" / "python"
    if not found.exists():
        pytest.skip(f"no environment of {tool}: `make interop` builds it")
    return found


def told(python: Path, tool: str, jobs: list[dict[str, Any]], home: Path) -> list[dict[str, np.ndarray]]:
    """Have a tool do some jobs; latents and outputs of each."""
    np.save(home / "rows.npy", rows().numpy())
    for number, job in enumerate(jobs):
        job |= {"rows": str(home / "rows.npy"), "out": str(home / f"{number}.npz")}
    (home / "jobs.json").write_text(json.dumps(jobs))
    ran = subprocess.run(
        [python, SCRIPT, tool, home / "jobs.json"], cwd=home, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    errors = {job["out"]: Path(job["out"] + ".error") for job in jobs}
    for out, error in errors.items():
        assert not error.exists(), (out, error.read_text()[-3000:])
    return [dict(np.load(job["out"])) for job in jobs]


def test_what_is_written_is_what_the_tool_computes(tool: str, python: Path, tmp_path: Path, table: Table) -> None:
    """Every architecture and variant of ours, autoencoder and transcoder, that the tool has words for."""
    ours = []
    for number, (case, d_out) in enumerate((case, d_out) for case in CASES for d_out in (None, D)):
        sae = made(settings(case), d_out)
        train(sae, batches(d_out, 3), lr=1e-2)
        sae = sae.fold().eval()  # latents of the data's units, as they are written
        hooks = ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out") if d_out else ("blocks.0.hook_resid_post", None)
        folder = tmp_path / str(number)
        if tool == "circuit-tracer" and sae.rule.name == "topk":
            continue  # which its repository has, and release 0.5.0 has not
        try:
            formats.write(sae, Metadata("gpt2", *hooks, 8, False, None, (1, None), (0,)), folder, tool)
        except SaeError:
            continue
        ours.append((case["arch"] + (" transcoder" if d_out else ""), sae, folder))
    assert len(ours) >= 4
    found = told(python, tool, [{"do": "open", "folder": str(folder)} for *_, folder in ours], tmp_path)
    for (what, sae, _), theirs in zip(ours, found, strict=True):
        with torch.no_grad():
            table.add(tool, "written", what, sae.encode(rows()).dense(), theirs["latents"])
            table.add(tool, "written", what, sae(rows()), theirs["output"])


def test_what_the_tool_wrote_is_read_as_it_computes(tool: str, python: Path, tmp_path: Path, table: Table) -> None:
    if not THEIRS[tool]:
        pytest.skip(f"{tool} writes none")
    jobs = [
        {"do": "make", "kind": kind, "folder": str(tmp_path / f"made-{number}"), "d_in": D, "d_sae": M, "d_out": D_OUT,
         "k": K}
        for number, kind in enumerate(THEIRS[tool])
    ]  # fmt: skip
    for job, theirs in zip(jobs, told(python, tool, jobs, tmp_path), strict=True):
        dictionary = formats.read(str(job["folder"])).dictionary
        table.add(tool, "read", str(job["kind"]), dictionary.encode(rows()).dense(), theirs["latents"])
        table.add(tool, "read", str(job["kind"]), dictionary(rows()), theirs["output"])
        assert (theirs["latents"] > 0).any() and (theirs["latents"] == 0).any()


def test_heads_side_by_side(python: Path, tool: str, tmp_path: Path, table: Table) -> None:
    if tool != "saelens":
        pytest.skip("a word of SAELens")
    sae = made(settings({"arch": "topk"})).eval()
    formats.write(sae, Metadata("gpt2", "blocks.0.attn.hook_z"), tmp_path / "z", tool)
    (theirs,) = told(python, tool, [{"do": "open", "folder": str(tmp_path / "z")}], tmp_path)
    table.add(tool, "written", "topk of attn_z", sae(rows()).detach(), theirs["output"])
