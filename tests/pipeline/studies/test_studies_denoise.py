"""The study of denoising: forecasts that look back only, the same for all inputs, and figures that can be checked."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import done, sae
from support.small_studies import BASE, lab_in
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.pipeline.harvest.sources.series import SeriesConfig, SeriesSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import parse
from sae.pipeline.studies.denoise import PERSISTENCE, Denoise, Inputs, Series, compared, over_variance, series_of, told
from sae.pipeline.studies.forecaster import Forecaster, Order, Size, forecasts, trained
from sae.pipeline.studies.study import Setup

SMALL = Size(width=16, depth=1, heads=2, past=6, updates=60, lr=2e-2)
FAST = {"width": 8, "depth": 1, "heads": 2, "past": 8, "updates": 3}
GAPS = torch.tensor([True, True, False, False, True, True, True, True, True, True, True, False, True])


def world(root: Path, **settings: Any) -> Dataset:
    """A small series of known noise; the training store."""
    config = SeriesConfig.model_validate({"noisy": {"channels": 4, "sources": 2, "steps": 600, "snr": 3.0}, **settings})
    stores = harvest(SeriesSource.of_settings(config, Origins(root), Silent()), root, Silent()).stores
    return Dataset.of(stores["train"][0])


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    root = tmp_path_factory.mktemp("noisy")
    return root, world(root)


@pytest.fixture(scope="module")
def study(noisy: tuple[Path, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, dataset = noisy
    lab = lab_in(root, tmp_path_factory.mktemp("runs"))
    base = BASE.model_copy(update={"steps": 8})
    return Denoise(**FAST, components=2).run(Setup(base, dataset, lab, 2))


def test_what_cannot_be_looked_into_is_said_before_anything_is_trained(
    noisy: tuple[Path, Dataset], tmp_path: Path
) -> None:
    lab, base = lab_in(noisy[0], tmp_path / "runs"), BASE.model_copy(update={"steps": 8})
    with pytest.raises(SaeError, match=r"^arch = vae: is no sparse dictionary"):
        Denoise(**FAST).run(Setup(base.model_copy(update={"sae": parse({"arch": "vae"})}), noisy[1], lab, 1))
    with pytest.raises(SaeError, match="windows that follow without a gap or overlap; leave out lowpass"):
        Denoise(**FAST).run(Setup(base, world(tmp_path, window=4, stride=2), lab_in(tmp_path, tmp_path / "runs"), 1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_every_row_that_follows_another_is_forecast_once(length: int) -> None:
    order = Order(GAPS)
    places, there = order.contexts(order.every(length), length)
    assert sorted(places[:, 1:][there].tolist()) == [1, 2, 5, 6, 7, 8, 9, 10, 11, 13]
    assert (places[:, 1:] - places[:, :-1])[there].eq(1).all()
    assert order.begins.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 12]


def test_a_forecaster_looks_back_only_and_begins_as_persistence() -> None:
    model, rows = Forecaster(3, SMALL), torch.randn(2, 6, 3)
    assert torch.equal(model(rows), rows)
    torch.nn.init.normal_(model.out.weight)
    other = rows.clone()
    other[:, 4:] = 9
    assert torch.allclose(model(rows)[:, :4], model(other)[:, :4], atol=1e-6)
    assert not torch.allclose(model(rows)[:, 4:], model(other)[:, 4:], atol=1e-1)


def circle(n: int) -> Tensor:
    """Rows [n, 2] that turn: the next is a function of this one."""
    turned = 0.7 * torch.arange(n)
    return torch.stack([turned.sin(), turned.cos()], dim=1)


def test_targets_are_the_next_row() -> None:
    """A turn is learned from the rows in their order; of what is read in any other order there is nothing to learn."""
    rows = circle(300)
    order = Order(torch.ones(299, dtype=torch.bool))
    errors = []
    for read in (rows, rows[torch.randperm(300, generator=torch.Generator().manual_seed(0))]):
        model = trained(read, rows, order, SMALL, 0, lambda n: None)
        said = torch.zeros_like(rows)
        for places, forecast in forecasts(model, read, order, SMALL):
            said[places] = forecast
        errors.append(over_variance(said[1:], rows[1:]))
    persistence = over_variance(rows[:-1], rows[1:])
    assert errors[0] < 0.01 < 0.3 < persistence and errors[1] > 0.5


def test_all_forecasters_begin_alike_and_see_the_same_places() -> None:
    rows, order = circle(40), Order(torch.ones(39, dtype=torch.bool))
    size = Size(width=8, depth=1, heads=2, past=4, updates=2, lr=1e-3)
    state = torch.get_rng_state()
    first, again, other = (trained(rows, rows, order, size, seed, lambda n: None) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.into.weight, other.into.weight)


def of(rows: Tensor, *, window: int = 1, gap: int | None = None, stride: int | None = None) -> Series:
    follows = torch.ones(len(rows) - 1, dtype=torch.bool)
    if gap is not None:
        follows[gap] = False
    return Series(rows, Order(follows), None, rows.shape[1] // window, window, stride or window)


def inputs(train: Series, **settings: Any) -> Inputs:
    return Inputs(Denoise(**settings), train, None, {"seed": 0, "l0": 1.6})  # type: ignore[arg-type]


def test_the_low_pass_looks_back_only_and_not_over_a_gap() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    made = inputs(of(rows), cutoff=0.2)
    smooth = made.of("lowpass", of(rows, gap=19))
    later = rows.clone()
    later[10:20] = 5.0
    other = made.of("lowpass", of(later, gap=19))
    assert torch.equal(smooth[:10], other[:10]) and torch.equal(smooth[20:], other[20:])
    assert not torch.allclose(smooth[10:20], other[10:20])
    assert smooth.diff(dim=0).square().mean() < 0.3 * rows.diff(dim=0).square().mean()
    assert torch.equal(smooth[0], rows[0]) and torch.allclose(smooth[20], rows[20], atol=1e-6)
    of_windows = made.of("lowpass", of(rows.reshape(20, 12), window=2, gap=9))
    assert torch.allclose(of_windows.reshape(40, 6), smooth, atol=1e-6)
    with pytest.raises(SaeError, match="windows that follow without a gap or overlap; leave out lowpass"):
        made.of("lowpass", of(rows, window=2, stride=1))


def test_pca_keeps_the_directions_of_training_rows_with_the_most_variance() -> None:
    random = np.random.default_rng(0)
    rows = torch.from_numpy(random.normal(size=(200, 2)) @ random.normal(size=(2, 5)) * 3 + 7).float()
    noise = 0.01 * torch.from_numpy(random.normal(size=(200, 5))).float()
    made = inputs(of(rows + noise))
    assert made.components == 2  # the dictionary's L0
    assert (made.of("pca", of(rows + noise)) - rows).abs().max() < 0.05
    assert torch.allclose(inputs(of(rows), components=9).of("pca", of(rows)), rows, atol=1e-4)


def test_the_control_has_the_same_rows_in_another_order() -> None:
    rows = torch.arange(50.0)[:, None]
    shuffled = inputs(of(rows)).of("shuffled", of(rows))
    assert sorted(shuffled[:, 0].tolist()) == rows[:, 0].tolist() and not torch.equal(shuffled, rows)


def test_figures_by_hand() -> None:
    clean, noise = torch.tensor([0.0, 2.0, 0.0, 2.0])[:, None], torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None]
    series = Series(clean + noise, Order(torch.ones(3, dtype=torch.bool)), clean, 1, 1, 1)
    figures = told(series, torch.tensor([[9.0], [2.0], [1.0], [1.0]]), clean + 0.5 * noise)
    assert figures["nmse"] == pytest.approx((1 + 0 + 4) / (8 / 3))
    assert figures["nmse_clean"] == pytest.approx((0 + 1 + 1) / (8 / 3))
    assert figures["snr"] == pytest.approx(10 * math.log10(4))
    assert figures["snr_gain"] == pytest.approx(20 * math.log10(2))
    assert figures["removed"] == pytest.approx(4 * 0.25 / 3)


def test_what_is_within_the_spread_is_no_difference() -> None:
    errors = {"raw": (1.0, 1.2, 1.1), "sae": (1.01, 1.18, 1.12), "pca": (0.5, 0.72, 0.58), PERSISTENCE: (2.0, 2.3, 2.0)}
    rows = [{"input": name, "seed": i, "nmse": one} for name, of in errors.items() for i, one in enumerate(of)]
    found = compared(rows)
    verdicts = {name: one["verdict"] for name, one in found.items()}
    assert verdicts == {"sae": "no difference", "pca": "better", PERSISTENCE: "worse"}
    assert found["sae"]["difference"] == pytest.approx(0.01 / 3)
    assert compared(rows[::3])["pca"] == {"difference": -0.5, "spread": None, "verdict": None}


def test_the_table_has_every_input_and_the_noise(study: Any, noisy: tuple[Path, Dataset], tmp_path: Path) -> None:
    table = {row["input"]: row for row in study.table}
    assert list(table) == ["raw", "sae", "pca", "lowpass", "shuffled", PERSISTENCE]
    assert all(row["seeds"] == 2 and row["nmse"] > 0 and row["nmse_clean"] > 0 for row in table.values())
    raw = table["raw"]
    assert raw["snr_gain"] == 0 and raw["removed"] == 0 and raw["snr"] == pytest.approx(3, abs=2)
    assert table["pca"]["snr_gain"] > 0 > table["shuffled"]["snr_gain"]
    assert table["sae"]["l0"] == pytest.approx(4, abs=0.1) and table["raw"]["l0"] is None
    assert table[PERSISTENCE]["nmse_sd"] == 0 and table[PERSISTENCE]["snr"] is None
    root, dataset = noisy
    _, held_out = series_of(dataset, root)
    assert held_out.clean is not None
    assert table[PERSISTENCE]["nmse"] == pytest.approx(over_variance(held_out.rows[:-1], held_out.rows[1:]))
    assert table["raw"]["snr"] == pytest.approx(-10 * math.log10(over_variance(held_out.rows, held_out.clean)))
    written = study.write(tmp_path / "out")
    assert {Path(one).name for one in written.values()} == {"table.csv", "results.json", "plot.png"}
    said = json.loads((tmp_path / "out/results.json").read_text())
    assert set(said["verdicts"]) == {*table} - {"raw"} and said["rows"] == {"train": 480, "validation": 120}
    lines = Denoise().lines(study, plain=True)
    said_of = re.compile(r"(\w+) beside raw: error [+-].* \+- .*: (better|worse|no difference)")
    assert [found[1] for line in lines if (found := said_of.fullmatch(line))] == [*table][1:]


def test_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    np.save("x.npy", np.random.default_rng(0).normal(size=(300, 3)).cumsum(0))
    done("synthesize series x.npy --window 2")
    fast = "--d-sae 6 --k 2 --steps 3 --set train.batch=32 --width 8 --depth 1 --past 4 --updates 2 --device cpu"
    answer = done(f"study denoise {fast} --seeds 1 --inputs raw,sae --json").json
    assert [row["input"] for row in answer["table"]] == ["raw", "sae", PERSISTENCE]
    assert all(row["snr"] is None and row["nmse"] > 0 for row in answer["table"])
    assert answer["verdicts"]["sae"]["verdict"] is None
    assert "one seed says nothing of the spread" in done(f"study denoise {fast} --seeds 1 --inputs raw,sae").out
    for words, message in {
        "--heads 3": "study.denoise: heads 3: do not divide a width of 8",
        "--inputs raw,fft": "--inputs raw,fft: ",
        "--updates 0": "--updates 0: ",
        "--cutoff 1": "--cutoff 1: input should be less than 1",
        "--past 0": "--past 0: ",
    }.items():
        refused = sae(f"study denoise {fast} {words}")
        assert (refused.code, message in refused.complaint) == (2, True), (words, refused.err)
    np.save("y.npy", np.random.default_rng(0).normal(size=(300, 3)))
    done("synthesize rows y.npy --codec float32")
    assert "is no time series; `sae synthesize series` makes a store of one" in sae(f"study denoise {fast}").complaint
