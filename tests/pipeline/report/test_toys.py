"""The report of a dictionary on a toy's rows: the toy is drawn, in the plane or as products of its features."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import done, sae
from support.small_stores import shrunk

from sae.cache.errors import DamagedStore
from sae.cache.runs import Run
from sae.pipeline.report.toys import LEVELS, MOST, TOY, DrawnToy, drawn_toy, toy_html

MADE = "--rows 10 --set synthesize.steps=20 --set synthesize.batch=32 --set synthesize.validation_rows=1 --json"
TRAIN = "train --arch topk --k 1 --d-sae 5 --steps 3 --batch 8 --device cpu"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_report_of_a_toy(home: Path) -> None:
    with shrunk():
        for hidden, name in ((2, "plane"), (3, "products")):
            key = done(f"synthesize toy --features 5 --hidden {hidden} {MADE}").json["key"]
            done(f"{TRAIN} --activations {key} --name {name}")
            done(f"eval {name} --device cpu --set eval.dead_rows=0")
            told = done(f"report {name} --json").json
            page = Path(told["report"]).read_text("utf-8")
            assert "The toy model" in page and "What latents fire on" not in page and "True features found" in page
            assert ("Features in the plane" in page) == (hidden == 2) and ("W Wᵀ of all of them" in page) == (
                hidden > 2
            )
            again = page
            assert Path(done(f"report {name} --json").json["report"]).read_text("utf-8") == again
        said = home / "runs" / "plane" / TOY
        said.write_text(json.dumps({**json.loads(said.read_text()), "weight": [[1, 2], [3]]}))
        assert sae("report plane").code == 0, "it is written anew"
        said.write_text('{"weight": [[1, 2], [3]], "features": 2}')
        with pytest.raises(DamagedStore, match=r"toy\.json: is not what was written"):
            drawn_toy(Run(home / "runs" / "plane"))


def test_features_in_the_plane_lie_where_they_are() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    html = toy_html(DrawnToy.of(weight, torch.tensor([[0.0, -3.0]])))
    lines = re.findall(r'<line class="line (s\d)( dashed)?" x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)">', html)
    ends = [(kind, float(x) - 210, 210 - float(y)) for kind, _, _, _, x, y in lines]
    unit = 0.44 * 420
    assert [kind for kind, *_ in ends] == ["s1", "s0", "s0"]
    np.testing.assert_allclose([end[1:] for end in ends], [[0, -unit], [unit, 0], [0, unit / 2]], atol=0.1)


def test_products_are_shaded_by_their_size() -> None:
    weight = torch.eye(3).repeat(1, 1)
    weight[1] = -weight[0]
    html = toy_html(DrawnToy.of(weight, torch.randn(4, 3)))
    cells = re.findall(r'<path class="cell (s\d)" fill-opacity="(.*?)" d="(.*?)">', html)
    found = {(kind, float(shade)): len(re.findall("M", path)) for kind, shade, path in cells}
    assert found == {("s0", 1.0): 3, ("s4", 1.0): 2} and LEVELS == 8
    assert "[3, 3]" not in html and "others -1.00 to 0.00" in html


def test_of_many_features_the_first_are_drawn() -> None:
    toy = DrawnToy.of(torch.randn(300, 20), torch.randn(7, 20))
    assert len(toy.weight) == MOST and toy.features == 300 and toy.learned == []
    assert f"the first {MOST} of them" in toy_html(toy) and len(toy_html(toy)) < 1_000_000
