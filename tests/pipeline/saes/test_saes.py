"""The contract every dictionary keeps, met by everything registered."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError
from support.saes_kit import CASES, B, D, GroundTruth, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.saes import Clock, encoder, linears, sparse
from sae.pipeline.saes.dictionary import FixedDictionary
from sae.pipeline.saes.encoder import Preactivations
from sae.pipeline.saes.sparse import SparsePattern

single = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(params=CASES, ids=lambda case: ",".join(str(value) for value in case.values()))
def config(request: pytest.FixtureRequest) -> saes.Config:
    return settings(request.param)


@pytest.fixture(params=[None, D, 7], ids=["autoencoder", "transcoder", "narrower"])
def d_out(request: pytest.FixtureRequest) -> int | None:
    return request.param


narrow = pytest.mark.parametrize("d_out", [None, 7], ids=["autoencoder", "narrower"], indirect=True)


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
    torch.testing.assert_close(sae.decode(replace(active, values=active.dense(), entries=None)), sae(x))
    if d_out is None:
        assert torch.equal(sae.W_enc_rows, sae.W_dec * config.encoder_scale)
    if config.input_scale in ("rms", "unit"):
        mean_square = (x * sae.scale).square().sum(1).mean()
        expected = torch.tensor(1.0 if config.input_scale == "unit" else float(D))
        torch.testing.assert_close(mean_square, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="target"):
        sae.loss(x, x.clone() if d_out is None else None)
    assert d_out is not None or torch.equal(sae.loss(x, x).total, losses.total)


def test_terms_add_up_exactly_and_loss_changes_nothing(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    before = copy.deepcopy(sae.state_dict())
    x, y = next(batches(d_out, 1))
    losses = sae.loss(x, y)
    total = losses.total
    assert total.item() == sum(losses.terms.values()).item()
    assert all(term.shape == () for term in losses.terms.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    wanted = (x if y is None else y) * sae.target_scale
    if config.input_scale == "per_token" and y is None:
        wanted = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    error = (wanted - losses.reconstruction).square().sum(1).mean()
    if config.reduction == "sum_d":
        torch.testing.assert_close(losses.terms["reconstruction"], error)


def test_an_architecture_says_what_is_per_latent_and_what_learns_at_which_rate(
    config: saes.Config, d_out: int | None
) -> None:
    """M is no width of anything else here, so that the shapes tell what must be said."""
    sae = made(config, d_out)
    named = dict(sae.named_parameters())
    said = sae.latent_parameters()
    assert all(value is named[name] for name, value in said.items())
    assert said.keys() == {name for name, value in named.items() if value.shape[:1] == (M,)}
    groups = sae.parameter_groups()
    for inside, side in enumerate(("encoder", "decoder")):  # in the order in which checkpoints number them
        own = [id(one) for group in groups if group.side == side for one in group.parameters]
        assert own == [id(value) for name, value in named.items() if (name in ("W_dec", "b_dec")) == inside]
    assert [group.side for group in groups] == sorted((group.side for group in groups), reverse=True)


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

    def at(pre: Preactivations, entries: SparsePattern, values: Tensor) -> Tensor:
        return ((pre.x - pre.centre) @ pre.weight.T + pre.bias)[entries.row_ids, entries.indices]

    def decode(values: Tensor, entries: SparsePattern, table: Tensor) -> Tensor:
        full = values.new_zeros(entries.batch, entries.d_sae)
        return full.index_put((entries.row_ids, entries.indices), values.reshape(-1)) @ table

    def centred_linear(x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x - centre) @ weight.T + bias

    monkeypatch.setattr(Preactivations, "gather", at)
    monkeypatch.setattr(sparse, "decode", decode)
    monkeypatch.setattr(linears, "centred_linear", centred_linear)
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


def test_under_autocast_the_loss_and_gradients_stay_close_and_float32(config: saes.Config) -> None:
    sae, x = made(config), next(batches(None, 1))[0]
    sae.loss(x).total.backward()
    full = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    sae.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = sae.loss(x)
    losses.total.backward()
    torch.testing.assert_close(losses.total, sae.loss(x).total, rtol=0.05, atol=0)
    least = 0.005 * torch.cat([expected.flatten() for expected in full]).norm()  # parts that nearly cancel
    for parameter, expected in zip(sae.parameters(), full, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        alike = F.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0) > 0.95
        assert alike or (parameter.grad - expected).norm() < least


def test_unit_rows_after_every_step_and_in_what_is_saved(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out)
    if config.decoder_norm != "unit":
        train(sae, batches(d_out, 2), lr=0.1)
        assert not unit(sae.W_dec)
        return
    assert unit(sae.W_dec)
    for batch in batches(d_out, 5):
        train(sae, iter([batch]), lr=0.1)
        assert unit(sae.W_dec)
    assert unit(sae.formula().W_dec)


def test_before_step_leaves_no_gradient_along_unit_rows() -> None:
    sae = made(settings({"arch": "topk"}))
    sae.loss(next(batches(None, 1))[0]).total.backward()
    sae.before_step()
    assert sae.W_dec.grad is not None
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(M), atol=1e-5, rtol=0)


@narrow
def test_loss_falls_on_planted_data(config: saes.Config, d_out: int | None) -> None:
    history = [losses.terms["reconstruction"].item() for losses in train(made(config, d_out), batches(d_out, 40), 1e-2)]
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


def test_loss_falls_on_synthetic_ground_truth(config: saes.Config) -> None:
    truth = GroundTruth(D, 24, active=3, groups=4)
    sae = saes.create(config, D)
    sae.initialise(truth(512))
    history = [
        losses.terms["reconstruction"].item() for losses in train(sae, ((truth(B), None) for _ in range(40)), 1e-2)
    ]
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


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
    resumed.seed = straight.seed
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
    folded, formula = sae.fold(), sae.formula()
    again, fixed = type(sae).from_formula(sae.config, formula).eval(), FixedDictionary(formula)
    expected, latents = sae(x), sae.encode(x).dense()
    for other in (folded, again, fixed):
        assert other.scale == 1 and other.target_scale == 1
        assert (other(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
        torch.testing.assert_close(other.encode(x).dense() * sae.target_scale, latents, rtol=1e-4, atol=1e-5)
    assert formula.W_enc.shape == (D, M) and formula.W_dec.shape == (M, d_out or D)
    assert sae.scale != 1 or config.input_scale in ("none", "per_token")
    assert not fixed(x).requires_grad and sae.W_dec.requires_grad
    assert FixedDictionary(fixed.formula()).encode(x).dense().equal(fixed.encode(x).dense())


def test_a_formula_that_is_not_of_the_settings() -> None:
    sae = made(settings({"arch": "topk"}))
    formula = sae.formula()
    for other, said in (
        (settings({"arch": "l1"}), "an? L1 of these settings is .*relu.* not .*topk"),
        (settings({"arch": "topk", "k": 5}), "'k': 5.* not .*'k': 4"),
        (settings({"arch": "topk", "pre_encoder_bias": False}), "'centred': False"),
        (settings({"arch": "topk", "input_scale": "per_token"}), "'row_scaling': 'standard'"),
        (settings({"arch": "topk", "d_sae": M + 1}), f"d_sae: {M + 1} in the config"),
    ):
        with pytest.raises(ValueError, match=said):
            saes.ARCHITECTURES[other.arch].from_formula(other, formula)


def test_dead_counters_count_rows(config: saes.Config) -> None:
    sae = made(config.model_copy(update={"dead_after": 3 * B}))
    data = list(batches(None, 3))
    never = torch.ones(M, dtype=torch.bool)
    for x, _ in data:
        fired = sae.encode(x).fired() > 0
        never &= ~fired
        train(sae, iter([(x, None)]), lr=0)
        assert torch.equal(sae.rows_since_fired == 0, fired)
    assert torch.equal(sae.dead(Clock(3, 4, B)), never)
    assert sae.rows_since_fired.dtype == torch.int64


def test_a_window_is_rows_or_a_share_of_the_training() -> None:
    sae = made(settings({"arch": "topk", "dead_after": 0.25}))
    sae.rows_since_fired[:3] = torch.tensor([99, 100, 101])
    assert sae.dead(Clock(5, 8, 50))[:4].tolist() == [False, True, True, False]
    assert sae.dead(Clock(5, 1, 50))[:4].tolist() == [True, True, True, False]
    assert not sae.dead(saes.FINISHED).any()
    with pytest.raises(ValueError, match=r"0\.25 is a share"):
        sae.dead(Clock(5, 8))
    sae = made(settings({"arch": "topk", "dead_after": 100}))
    sae.rows_since_fired[:3] = torch.tensor([99, 100, 101])
    assert sae.dead(Clock(0, 1))[:4].tolist() == [False, True, True, False]


# Odd batches


def silenced(sae: saes.SAE) -> None:
    """No latent has a positive pre-activation, whatever the row."""
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        for name, parameter in sae.named_parameters():
            if name == "b_mag":
                parameter.fill_(-1e4)


ODD = {
    "nothing fires": lambda sae, x: (silenced(sae), x)[1],
    "one row": lambda sae, x: x[:1],
    "the same row": lambda sae, x: x[:1].expand(B, -1).clone(),
    "zeros": lambda sae, x: 0 * x,
}


@narrow
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_batch_leaves_numbers(config: saes.Config, d_out: int | None, odd: str) -> None:
    """Training goes on after it: every weight, counter and threshold stays finite, and so does every term."""
    sae = made(config, d_out)
    sae.rows_since_fired[: M // 2] = config.dead_after
    x, y = next(batches(d_out, 1))
    x = ODD[odd](sae, x)
    history = train(sae, iter([(x, None if y is None else y[: len(x)])] * 3))
    assert all(term.isfinite() for losses in history for term in losses.terms.values())
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
    if odd == "nothing fires" and config.arch in ("batchtopk", "matryoshka"):
        assert not history[0].latents.fired().any() and sae.threshold == 0


def test_weights_that_are_no_numbers_raise_nothing(config: saes.Config) -> None:
    """Whoever trains looks at the loss now and then; until then steps go on."""
    sae = made(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(torch.nan)
    assert not train(sae, batches(None, 2))[-1].total.isfinite()
    assert sae.eval()(next(batches(None, 1))[0]).shape == (B, D)


def test_no_rows_are_encoded_and_decoded_but_have_no_loss(config: saes.Config, d_out: int | None) -> None:
    """As where no token of some contexts becomes a row."""
    sae = made(config, d_out)
    x, y = next(batches(d_out, 1))
    for mode in (sae.train(), sae.eval()):
        active = mode.encode(x[:0])
        assert active.dense().shape == (0, M) and active.l0().shape == (0,) and not active.fired().any()
        assert mode.decode(active).shape == (0, d_out or D)
    with pytest.raises(ValueError, match="without rows"):
        sae.loss(x[:0], None if y is None else y[:0])


def test_rows_may_come_in_any_shape_and_precision(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out).eval()
    x = Planted(seed=3)(6)
    with torch.no_grad():
        latents = sae.encode(x)
        dense, y_hat = latents.dense(), sae.decode(latents)
        for lead in ((2, 3), (1, 6, 1), (3, 2)):
            shaped = sae.encode(x.view(*lead, D))
            assert torch.equal(shaped.dense(), dense.view(*lead, M))
            assert torch.equal(shaped.l0(), latents.l0().view(lead))
            assert torch.equal(sae.decode(shaped), y_hat.view(*lead, sae.d_out))
            assert torch.equal(sae(x.view(*lead, D)), y_hat.view(*lead, sae.d_out))
        one = sae.encode(x[0])
        assert one.dense().shape == (M,) and one.l0().shape == () and sae.decode(one).shape == (sae.d_out,)
        assert sae.encode(x.bfloat16()).dense().dtype == torch.float32
        assert sae(x.view(2, 3, D)[:0]).shape == (0, 3, sae.d_out)


def test_dense_values_decode_as_latents_do(config: saes.Config, d_out: int | None) -> None:
    sae = made(config, d_out).eval()
    with torch.no_grad():
        latents = sae.encode(Planted(seed=3)(6).view(2, 3, D))
        values = latents.dense()
        torch.testing.assert_close(sae.decode(latents.edited(values)), sae.decode(latents))
        doubled = latents.edited(2 * values)
        assert torch.equal(doubled.dense(), 2 * values)
        if sae.row_scaling == "none" or sae.is_transcoder:
            assert torch.equal(sae.decode(values), sae.decode(latents.edited(values)))
            assert sae.decode(values[0, 0]).shape == (sae.d_out,)
            assert torch.equal(sae.decode(values.double()), sae.decode(values))
        else:
            with pytest.raises(ValueError, match=r"latents\.edited"):
                sae.decode(values)


def test_rows_and_latents_of_another_width_are_refused() -> None:
    sae = made(settings({"arch": "topk"}))
    for x in (torch.zeros(2, D + 1), torch.zeros(D, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"reads \[\.\.\., {D}\]"):
            sae.encode(x)
    for values in (torch.zeros(2, D), torch.zeros(())):
        with pytest.raises(ValueError, match=f"this dictionary has {M}"):
            sae.decode(values)
    for call, what in ((sae.encode, "x is a list; give a torch tensor"), (sae.decode, "latents are a list; give what")):
        with pytest.raises(TypeError, match=what):
            call([[0.0] * D])  # type: ignore[operator]
    latents = sae.encode(torch.ones(2, D))
    for values in (torch.zeros(3, M), torch.zeros(2, M - 1), torch.zeros(())):
        with pytest.raises(ValueError, match="cannot have values"):
            latents.edited(values)
