"""The contract every dictionary keeps, met by everything registered, and what TopK and L1 add to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError
from torch import Tensor

from pipeline import saes
from pipeline.saes import SAE, Clock, encoder, sparse
from pipeline.saes.encoder import Preactivations
from pipeline.saes.sparse import Entries

D, M, B = 12, 32, 64

SMALL: dict[str, dict[str, Any]] = {"topk": {"k": 4}, "l1": {"coefficient": 0.2}}
"""What an architecture needs set to work at these sizes."""

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"decoder_norm": "free"}, {"b_dec_init": "none", "pre_encoder_bias": False, "encoder_bias": False}],
    "l1": [
        {"decoder_norm": "free", "penalty": "decoder_norm", "init": "april"},
        {"penalty": "per_token", "pre_encoder_bias": False, "reduction": "mean_d", "coefficient": 0.05},
        {"penalty": "decoder_norm", "encoder_bias": False, "input_scale": "none", "reduction": "fvu"},
    ],
}
"""Further settings to meet the contract with, beside an architecture's defaults."""

CASES = [{"arch": tag} | variant for tag in saes.ARCHITECTURES for variant in ({}, *VARIANTS.get(tag, []))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small a second thread only waits, for milliseconds a product when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(case: dict[str, Any]) -> saes.Config:
    return saes.parse({"d_sae": M, "b_dec_init": "mean"} | SMALL.get(case["arch"], {}) | case)


@pytest.fixture(params=CASES, ids=lambda case: ",".join(str(value) for value in case.values()))
def config(request: pytest.FixtureRequest) -> saes.Config:
    return settings(request.param)


@pytest.fixture(params=[None, D, 7], ids=["autoencoder", "transcoder", "narrower"])
def d_out(request: pytest.FixtureRequest) -> int | None:
    return request.param


class Planted:
    """Rows that are sparse sums of unit features, far from the origin: what a dictionary should find."""

    def __init__(self, width: int = D, features: int = 24, active: int = 3, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.features = F.normalize(torch.randn(features, width, generator=self.generator), dim=1)
        self.active = active

    def __call__(self, count: int = B) -> Tensor:
        scores = torch.rand(count, len(self.features), generator=self.generator)
        sizes = 0.5 + torch.rand(count, self.active, generator=self.generator)
        which = scores.topk(self.active, dim=1).indices
        return 3 * F.embedding_bag(which, self.features, per_sample_weights=sizes, mode="sum") + 1


def batches(d_out: int | None, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    rows, into = Planted(), torch.randn(D, d_out or 1, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        x = rows()
        yield x, None if d_out is None else (x @ into).relu()


def made(config: saes.Config, d_out: int | None = None, seed: int = 0) -> SAE:
    sae = saes.create(config, D, d_out, seed=seed)
    sae.initialise(*next(batches(d_out, 1)))
    return sae


def train(
    sae: SAE,
    data: Iterator[tuple[Tensor, Tensor | None]],
    lr: float = 3e-3,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[saes.Losses]:
    optimizer = optimizer or torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    history = []
    for step, (x, y) in enumerate(data):
        losses = sae.loss(x, y, Clock(step, 1000))
        optimizer.zero_grad()
        losses.total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step(losses.latents)
        history.append(losses)
    return history


def unit(rows: Tensor) -> bool:
    return bool((torch.linalg.vector_norm(rows.double(), dim=1) - 1).abs().max() <= 1e-6)


# Settings


def test_the_union_of_configs_is_told_apart_by_arch(config: saes.Config) -> None:
    assert saes.parse(json.loads(config.model_dump_json())) == config

    class Outer(BaseModel):
        sae: saes.AnyConfig

    assert Outer.model_validate({"sae": config.model_dump()}).sae == config
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        saes.parse({"arch": "nonesuch"})
    with pytest.raises(ValidationError, match="frozen"):
        config.d_sae = 1


@pytest.mark.parametrize("tag", saes.ARCHITECTURES)
def test_every_field_is_described_and_unknown_ones_refused(tag: str) -> None:
    config_type = saes.ARCHITECTURES[tag].config_type
    assert all(field.description for field in config_type.model_fields.values())
    with pytest.raises(ValidationError, match="Extra inputs"):
        config_type.model_validate({"dictionary_size": 3})


@pytest.mark.parametrize(
    ("case", "both"),
    [
        ({"arch": "topk", "k": 33, "d_sae": 32}, ("k: 33", "d_sae: 32")),
        ({"arch": "topk", "init": "april"}, ("init: april", "decoder_norm: unit")),
        ({"arch": "topk", "b_dec_init": "none"}, ("b_dec_init: none", "pre_encoder_bias: true")),
        ({"arch": "l1", "decoder_norm": "free"}, ("decoder_norm: free", "penalty: plain")),
    ],
)
def test_what_cannot_work_is_refused_naming_both_fields(case: dict[str, Any], both: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as refusal:
        saes.parse(case)
    assert all(field in str(refusal.value) for field in both)


def test_ramp() -> None:
    assert [saes.config.ramp(4, Clock(step, 100)) for step in (0, 1, 4, 50)] == [0, 0.25, 1, 1]
    assert [saes.config.ramp(0.5, Clock(step, 8)) for step in (0, 1, 4, 8)] == [0, 0.25, 1, 1]
    assert saes.config.ramp(0, Clock(0, 8)) == 1 and saes.config.ramp(2000, saes.FINISHED) == 1


# The contract


def test_shapes_and_start(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    x, y = next(batches(d_out, 1))
    width = d_out or D
    assert [tuple(t.shape) for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)] == [
        (D, M),
        (M,),
        (M, width),
        (width,),
    ]
    assert all(p.is_contiguous() for p in sae.parameters())
    active = sae.encode(x)
    assert active.dense().shape == (B, M) and active.d_sae == M
    assert sae.decode(active).shape == sae(x).shape == (B, width)
    losses = sae.loss(x, y)
    torch.testing.assert_close(losses.x_hat, sae(x))
    torch.testing.assert_close(sae.decode(saes.Latents.of_dense(active.dense())), sae(x))
    if d_out is None:
        assert torch.equal(sae.W_enc_rows, sae.W_dec)
    if config.input_scale == "rms":
        mean_square = (x * sae.scale).square().sum(1).mean()
        torch.testing.assert_close(mean_square, torch.tensor(float(D)), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="target"):
        sae.loss(x, x if d_out is None else None)


def test_terms_add_up_exactly_and_loss_changes_nothing(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    before = copy.deepcopy(sae.state_dict())
    x, y = next(batches(d_out, 1))
    losses = sae.loss(x, y)
    total = losses.total
    assert total.item() == sum(losses.terms.values()).item()
    assert all(term.shape == () for term in losses.terms.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    scale = sae.target_scale
    error = ((x if y is None else y) * scale - losses.reconstruction).square().sum(1).mean()
    if config.reduction == "sum_d":
        torch.testing.assert_close(losses.terms["reconstruction"], error)


def test_gradients_reach_every_parameter(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    x, y = next(batches(d_out, 1))
    sae.loss(x, y).total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.grad.is_contiguous(), name


def test_the_input_gets_a_gradient_when_it_asks(config: saes.Config) -> None:
    sae = made(config).double()
    x = next(batches(None, 1))[0].double().requires_grad_()
    found = torch.autograd.grad(sae(x).square().sum(), x)[0]
    step = 1e-6 * torch.randn_like(x)
    with torch.no_grad():
        change = (sae(x + step).square().sum() - sae(x - step).square().sum()) / 2
    torch.testing.assert_close((found * step).sum(), change, rtol=1e-5, atol=1e-9)


def dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every sparse product by the plain dense one and leave its gradient to autograd."""

    def at(pre: Preactivations, entries: Entries, values: Tensor) -> Tensor:
        return ((pre.x - pre.centre) @ pre.weight.T + pre.bias)[entries.rows, entries.indices]

    def decode(values: Tensor, entries: Entries, table: Tensor) -> Tensor:
        full = values.new_zeros(entries.batch, entries.d_sae)
        return full.index_put((entries.rows, entries.indices), values.reshape(-1)) @ table

    def centred_linear(x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x - centre) @ weight.T + bias

    monkeypatch.setattr(Preactivations, "at", at)
    monkeypatch.setattr(sparse, "decode", decode)
    monkeypatch.setattr(sparse, "centred_linear", centred_linear)
    monkeypatch.setattr(encoder, "SPARSE_BELOW", -1)


def test_whole_steps_equal_those_of_a_dense_twin(
    config: saes.Config, d_out: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps, the last two with dead latents; float64, so that only exactness can agree this well."""
    monkeypatch.setattr(encoder, "SPARSE_BELOW", 1)
    results = []
    for twin in (False, True):
        if twin:
            dense_twin(monkeypatch)
        sae = made(config, d_out).double()
        gradients = []
        for number, (x, y) in enumerate(batches(d_out, 4)):
            if number == 2:
                sae.rows_since_fired[: M // 2] = config.dead_after
            train(sae, iter([(x.double(), None if y is None else y.double())]))
            gradients += [p.grad.clone() for p in sae.parameters() if p.grad is not None]
        results.append([*gradients, *sae.state_dict().values()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_unit_rows_after_every_step_and_in_what_is_saved(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    if config.decoder_norm == "free":
        train(sae, batches(d_out, 2), lr=0.1)
        assert not unit(sae.W_dec)
        return
    assert unit(sae.W_dec)
    for batch in batches(d_out, 5):
        train(sae, iter([batch]), lr=0.1)
        assert unit(sae.W_dec)
    assert unit(sae.export_tensors()["W_dec"])


def test_before_step_leaves_no_gradient_along_unit_rows() -> None:
    sae = made(settings({"arch": "topk"}))
    sae.loss(next(batches(None, 1))[0]).total.backward()
    sae.before_step()
    assert sae.W_dec.grad is not None
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(M), atol=1e-5, rtol=0)


def test_loss_falls_on_planted_data(config: saes.Config, d_out: int | None) -> None:
    history = [losses.terms["reconstruction"].item() for losses in train(made(config, d_out), batches(d_out, 40), 1e-2)]
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


def test_the_seed_decides_everything(config: saes.Config, d_out: int | None) -> None:
    one, same, other = (made(config, d_out, seed=seed) for seed in (3, 3, 4))
    for sae in (one, same, other):
        train(sae, batches(d_out, 2))
    assert all(torch.equal(t, same.state_dict()[name]) for name, t in one.state_dict().items())
    assert not torch.equal(one.W_dec, other.W_dec)


def test_state_dict_resumes_bit_exactly(config: saes.Config) -> None:
    straight = made(config)
    data = list(batches(None, 6))
    optimizer = torch.optim.Adam(straight.parameters(), lr=1e-2, fused=True)
    train(straight, iter(data[:3]), optimizer=optimizer)
    weights, moments = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    train(straight, iter(data[3:]), optimizer=optimizer)

    resumed = saes.create(config, D, seed=9)
    resumed.load_state_dict(weights)
    optimizer = torch.optim.Adam(resumed.parameters(), lr=1.0, fused=True)
    optimizer.load_state_dict(moments)
    train(resumed, iter(data[3:]), optimizer=optimizer)
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in straight.state_dict().items())


def test_fold_and_export_are_the_function_that_was_trained(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    train(sae, batches(d_out, 10), lr=1e-2)
    sae.eval()
    x = 5 * next(batches(d_out, 1))[0]
    folded, tensors = sae.fold(), sae.export_tensors()
    again = type(sae).from_tensors(sae.config, tensors, transcoder=d_out is not None).eval()
    expected, latents = sae(x), sae.encode(x).dense()
    for other in (folded, again):
        assert other.scale == 1 and other.target_scale == 1
        assert (other(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
        torch.testing.assert_close(other.encode(x).dense() * sae.target_scale, latents, rtol=1e-4, atol=1e-5)
    assert all(t.is_contiguous() for t in tensors.values())
    assert tensors["W_enc"].shape == (D, M) and tensors["W_dec"].shape == (M, d_out or D)
    assert sae.scale != 1 or config.input_scale == "none"
    with pytest.raises(ValueError, match="nonesuch"):
        type(sae).from_tensors(sae.config, tensors | {"nonesuch": x}, transcoder=d_out is not None)
    with pytest.raises(ValueError, match="lack b_dec"):
        type(sae).from_tensors(sae.config, {name: t for name, t in tensors.items() if name != "b_dec"})
    if d_out not in (None, D):
        with pytest.raises(ValueError, match="transcoder"):
            type(sae).from_tensors(sae.config, tensors)


def test_saelens_config_has_what_its_loader_needs(config: saes.Config, d_out: int | None) -> None:
    described = made(config, d_out).saelens_config()
    assert json.loads(json.dumps(described)) == described
    assert {"architecture", "d_in", "d_sae", "dtype", "device", "normalize_activations", "reshape_activations"} <= set(
        described
    )
    assert (described["d_in"], described["d_sae"], described["dtype"]) == (D, M, "float32")
    assert described["normalize_activations"] == "none"
    assert described["apply_b_dec_to_input"] == (config.pre_encoder_bias and d_out is None)
    assert described.get("d_out") == d_out


def test_dead_counters_count_rows(config: saes.Config) -> None:
    sae = made(config.model_copy(update={"dead_after": 3 * B}))
    data = list(batches(None, 3))
    never = torch.ones(M, dtype=torch.bool)
    for x, _ in data:
        fired = sae.encode(x).fired() > 0
        never &= ~fired
        train(sae, iter([(x, None)]), lr=0)
        assert torch.equal(sae.rows_since_fired == 0, fired)
    assert torch.equal(sae.dead(), never)
    assert sae.rows_since_fired.dtype == torch.int64


# By the formula, written out, and as SAELens would run what is exported


def saelens_encode(tensors: dict[str, Tensor], described: dict[str, Any], x: Tensor) -> Tensor:
    p = (x - described["apply_b_dec_to_input"] * tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    if described["architecture"] == "topk":
        top = p.topk(described["k"], dim=1)
        p = torch.zeros_like(p).scatter(1, top.indices, top.values)
    return p.relu()


@pytest.mark.parametrize("case", [case for case in CASES if case["arch"] in ("topk", "l1")], ids=str)
def test_exported_tensors_run_by_saelens_rules(case: dict[str, Any]) -> None:
    sae = made(settings(case))
    train(sae, batches(None, 10), lr=1e-2)
    x, tensors = Planted(seed=5)(), sae.export_tensors()
    found = saelens_encode(tensors, sae.saelens_config(), x) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(found, sae(x), rtol=1e-4, atol=1e-4)


def test_topk_by_its_formula() -> None:
    """Reconstruction and AuxK written out densely: their values and all gradients, in float64."""
    sae = made(settings({"arch": "topk", "aux_k": 5, "dead_after": 10})).double()
    sae.rows_since_fired[:9] = 10
    x = Planted(seed=2)().double()
    losses = sae.loss(x)

    y = x * sae.scale
    p = (y - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc
    kept = torch.zeros_like(p).scatter(1, p.topk(4, dim=1).indices, 1.0)
    y_hat = (p * kept).relu() @ sae.W_dec + sae.b_dec
    e = (y - y_hat).detach()
    p_dead = p[:, :9].relu()
    kept = torch.zeros_like(p_dead).scatter(1, p_dead.topk(5, dim=1).indices, 1.0)
    auxk = (e - (p_dead * kept) @ sae.W_dec[:9]).square().sum() / (e - e.mean(0)).square().sum()
    expected = {"reconstruction": (y - y_hat).square().sum(1).mean(), "auxk": auxk / 32}

    torch.testing.assert_close(losses.terms, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(losses.total, parameters), torch.autograd.grad(sum(expected.values()), parameters)
    )


@pytest.mark.parametrize(
    ("penalty", "norm"), [("plain", "unit"), ("per_token", "unit"), ("decoder_norm", "unit"), ("decoder_norm", "free")]
)
def test_l1_by_its_formula(penalty: str, norm: str) -> None:
    case = {"arch": "l1", "penalty": penalty, "decoder_norm": norm, "coefficient": 0.7, "warmup": 10}
    sae = made(settings(case)).double()
    with torch.no_grad():
        sae.W_dec *= 1.0 if norm == "unit" else 1.7
    x = Planted(seed=2)().double()
    losses = sae.loss(x, clock=Clock(5, 100))

    y = x * sae.scale
    f = ((y - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc).relu()
    y_hat = f @ sae.W_dec + sae.b_dec
    sums = {
        "plain": f.sum(1),
        "per_token": f.sum(1) / y.norm(dim=1),
        "decoder_norm": (f * sae.W_dec.norm(dim=1)).sum(1),
    }
    expected = {"reconstruction": (y - y_hat).square().sum(1).mean(), "l1": 0.35 * sums[penalty].mean()}

    torch.testing.assert_close(losses.terms, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(losses.total, parameters), torch.autograd.grad(sum(expected.values()), parameters)
    )


@pytest.mark.parametrize("reduction", ["sum_d", "mean_d", "fvu"])
def test_reductions(reduction: str) -> None:
    sae = made(settings({"arch": "topk", "reduction": reduction}))
    y, y_hat = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    total = (y - y_hat).square().sum()
    expected = {"sum_d": total / B, "mean_d": total / (B * D), "fvu": total / (y - y.mean(0)).square().sum()}
    torch.testing.assert_close(sae.squared_error(y_hat, y), expected[reduction])


# What TopK is for


def test_topk_recovers_a_planted_dictionary() -> None:
    rows = Planted(width=16, features=24, active=2)
    sae = saes.create(saes.parse({"arch": "topk", "d_sae": 32, "k": 2, "dead_after": 5000}), 16)
    sae.initialise(rows(2048))
    train(sae, ((rows(128), None) for _ in range(250)), lr=1e-2)
    cosines = (sae.W_dec @ rows.features.T).amax(0)
    assert (cosines > 0.95).float().mean() > 0.9
    x = rows(1024)
    assert (x - sae(x)).square().sum() < 0.1 * (x - x.mean(0)).square().sum()


def test_auxk_revives_planted_dead_latents() -> None:
    rows, half, alive = Planted(), M // 2, {}
    for coefficient in (0.0, 1 / 32):
        sae = saes.create(settings({"arch": "topk", "aux_coefficient": coefficient, "dead_after": 2 * B}), D)
        sae.initialise(rows(512))
        with torch.no_grad():
            sae.b_enc[:half] = -3
        history = train(sae, ((rows(), None) for _ in range(60)), lr=1e-2)
        alive[coefficient] = int((sae.encode(rows(512)).fired()[:half] > 0).sum())
        aux = [losses.terms["auxk"].item() for losses in history if "auxk" in losses.terms]
        assert all(value == 0 for value in aux[:2])
        assert any(value > 0 for value in aux) == (coefficient > 0)
    assert alive[0.0] <= half // 4 and alive[1 / 32] >= 3 * half // 4
