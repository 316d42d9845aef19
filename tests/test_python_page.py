"""docs/python.md: its examples run, in order and as they are, and its list of names is the list of names.

So do those of the page about notebooks.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import PAGES
from support.small_models import small_stages

import sae

PAGE = PAGES["docs/python.md"]


def typed_into(page: str, names: dict[str, Any]) -> None:
    """Run a page's examples, one after the other, on the same names."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    with small_stages():
        typed_into("docs/python.md", names)
    assert names["x_hat"].shape == names["x"].shape
    assert torch.equal(names["theirs"](names["x"]), names["coder"](names["x"]))
    assert names["figures"]["ce_recovered_zero"] is not None and names["figures"]["rows"] > 500
    assert names["transcoder"].load().is_transcoder and names["page"].is_file()
    assert names["batch"].x.shape[1] == 128 and names["latents"].dense().shape[::2] == (1, 256)
    assert names["steered"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8
    said = capsys.readouterr().out.splitlines()
    assert said == re.findall(r"print\(error\) +# (.*)", PAGE)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with small_stages():
        typed_into("docs/howto/notebook.md", names)
    assert len(names["runs"]) == 3 and {"step", "fvu"} <= set(names["curve"].columns) and names["page"].is_file()


def test_every_name_is_on_the_page() -> None:
    table = PAGE.partition("## All names")[2]
    listed = set(re.findall(r"`(\w+)", table))
    few = {"Hybrid", "JL", "PAnneal", "ShiftedReLU", "VSAEMix", "VSAEMulti"}  # behind the dots
    assert set(dir(sae)) - few <= listed
