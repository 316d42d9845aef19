"""Learning rates: their shapes by the formulas, their ends, and the two groups."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import few

from sae.configs.base import REAL
from sae.pipeline.runtime import devices
from sae.pipeline.saes import (
    parse,
)
from sae.pipeline.train.resampling import (
    Resample,
)
from sae.pipeline.train.schedules import Schedule
from sae.pipeline.train.stage import TrainConfig

SHAPES = ("linear", "quarter_cosine", "half_cosine")


def curve(total: int, **settings: Any) -> list[float]:
    schedule = Schedule(**{"warmup": 0, "decay": 1, **settings})
    return [schedule.factor(step, total) for step in range(total)]


def test_the_shapes_over_all_steps() -> None:
    steps = range(10)
    assert curve(10) == pytest.approx([1 - t / 10 for t in steps])
    assert curve(10, shape="quarter_cosine") == pytest.approx([math.cos(math.pi * t / 18) for t in steps])
    assert curve(10, shape="half_cosine") == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in steps])
    assert curve(10, decay=0) == [1.0] * 10
    assert curve(10, decay=0, warmup=0.5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_part_and_the_shortest_trainings(shape: str) -> None:
    rates = curve(100, shape=shape, decay=0.2, warmup=0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71) and rates[0] == pytest.approx(0.1)
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[99] < 0.06
    assert curve(1, shape=shape) == [1.0]
    assert all(0 <= rate <= 1 for total in (2, 3) for rate in curve(total, shape=shape, decay=0.5, warmup=0.5))


shares = st.just(0.0) | st.floats(1 / REAL, 1)  # smaller ones are refused


@few
@given(shape=st.sampled_from(SHAPES), warmup=shares, decay=shares, total=st.integers(1, 200))
def test_rates_rise_once_and_fall_once(shape: str, warmup: float, decay: float, total: int) -> None:
    rates = curve(total, shape=shape, warmup=warmup, decay=min(decay, 1 - warmup))
    peak = rates.index(max(rates))
    assert all(-1e-12 <= rate <= 1 for rate in rates) and max(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_decoder_may_have_its_own() -> None:
    config = TrainConfig(lr=1e-3, warmup=0, decay=0, decoder=None)
    assert config.rates_at(5, 10) == (1e-3, 1e-3)
    assert TrainConfig(lr=1e-3, warmup=0, decay=0).rates_at(5, 10) == (1e-3, pytest.approx(3e-3))
    own = {"ratio": 4.0, "warmup": 0, "decay": 1, "shape": "half_cosine"}
    config = TrainConfig.model_validate({"lr": 1e-3, "warmup": 0, "decay": 0, "decoder": own})
    assert config.rates_at(0, 10) == (1e-3, pytest.approx(4e-3))
    assert config.rates_at(5, 10) == (1e-3, pytest.approx(2e-3))
    with pytest.raises(ValueError, match="together they are more than all steps"):
        TrainConfig.model_validate({"decoder": {"warmup": 0.9, "decay": 0.2}})


def test_resampling_is_due_and_the_rate_rises_again() -> None:
    resample = Resample(kind="resample", every=10, until=30, rewarm=4)
    assert [done for done in range(61) if resample.due(done, 60)] == [10, 20, 30]
    assert [resample.since(step, 60) for step in (0, 9, 10, 13, 20, 39, 45)] == [None, None, 0, 3, 0, 9, 15]
    shares = Resample(kind="resample", every=0.25, until=0.5)
    assert [done for done in range(41) if shares.due(done, 40)] == [10, 20]
    config = TrainConfig(lr=1.0, warmup=0, decay=0, revive=resample)
    rates = [config.rates_at(step, 60)[0] for step in range(60)]
    assert rates[8:15] == [1, 1, 0.25, 0.5, 0.75, 1, 1] and rates[30:34] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"accumulate": 9, "batch": 8}, "accumulate = 9 parts of a batch of 8 rows"),
        ({"revive": {"kind": "reinitialise"}, "sae": parse({"arch": "l1"})}, r"revive\.kind = reinitialise .* = l1"),
        ({"revive": {"kind": "nonesuch"}}, "nonesuch"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [(65_536, 4096, 320), (2_000, 1024, 39), (524_288, 4096, 1000), (10_000_000, 4096, 2441), (100, 100, 20)],
)
def test_small_stores_are_gone_through_several_times(rows: int, batch: int, steps: int) -> None:
    """1,000 steps, at most 20 passes, at least one."""
    settled = TrainConfig(batch=batch).settled(rows)
    assert (settled.steps, settled.rows, settled.store_rows) == (steps, None, rows)
    assert settled.total_steps(rows) == steps and settled.settled(rows) == settled


@pytest.mark.parametrize(
    ("arch", "usual"),
    [
        *((arch, (0.7, 0.99)) for arch in ("topk", "gated", "clt", "vsae_iso")),
        *((arch, (0.9, 0.999)) for arch in ("molt", "vae")),
    ],
)
def test_decay_rates_are_settled_by_what_is_trained(arch: str, usual: tuple[float, float]) -> None:
    settled = TrainConfig.model_validate({"sae": {"arch": arch}}).settled(65_536)
    assert settled.betas == settled.decay_rates == usual
    said = TrainConfig.model_validate({"sae": {"arch": arch}, "betas": (0.5, 0.9)}).settled(65_536)
    assert said.betas == said.decay_rates == (0.5, 0.9)


def test_what_is_said_is_not_settled_otherwise() -> None:
    one_pass = TrainConfig.model_validate({"rows": "all", "lr": 0.01}).settled(65_536)
    assert (one_pass.steps, one_pass.rows, one_pass.lr) == (None, "all", 0.01)
    assert one_pass.total_steps(65_536) == 16
    assert TrainConfig(steps=7).settled(65_536).total_steps(65_536) == 7


def test_precision_by_itself_is_that_of_the_device() -> None:
    """bfloat16 on a card where that costs nothing; what is said holds anywhere."""
    half = dict.fromkeys(("topk", "batchtopk", "matryoshka", "jumprelu", "l1", "gated"), "bfloat16")
    for arch, on_card in (half | {"p_anneal": "float32", "vae": "float32"}).items():
        config = TrainConfig.model_validate({"sae": {"arch": arch}})
        assert (config.precision_on(True), config.precision_on(False)) == (on_card, "float32")
        for said in ("float32", "bfloat16"):
            assert config.model_copy(update={"precision": said}).precision_on(True) == said


@pytest.mark.parametrize(
    ("name", "card", "halves"), [("cuda", (8, 0), True), ("cuda:1", (7, 5), False), ("cpu", (9, 0), False)]
)
def test_cards_of_before_2020_do_not_multiply_halves(
    name: str, card: tuple[int, int], halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take bfloat16 apart, which is slower than float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert devices.halves(torch.device(name)) == halves


@pytest.mark.parametrize(("d_sae", "lr"), [(32, 4e-3), (1024, 2.8e-3), (4096, 1.4e-3), (16_384, 7e-4)])
def test_the_rate_follows_the_width(d_sae: int, lr: float) -> None:
    config = TrainConfig.model_validate({"sae": {"arch": "topk", "d_sae": d_sae}})
    assert config.lr is None and config.rate == pytest.approx(lr)
    assert config.settled(100_000).lr == pytest.approx(lr)
