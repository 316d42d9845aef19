"""Cosines of Jacobians, formed whole by autograd: of functions, of a model's own MLP, of every kind of transcoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.harvesting import harvest
from support.saes_kit import SMALL, one_thread
from support.small_models import CONTEXT, blocks, plain_model, save_model, small_stages, token_store
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.cache.loader.dataset import Dataset
from sae.pipeline import saes
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.metrics import jacobian
from sae.pipeline.metrics.jacobian import JacobianCosine, cosines
from sae.pipeline.metrics.metric import Encoded, Subject
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import SAE

single = pytest.fixture(autouse=True, scope="module")(one_thread)
D = 10
SKIP: dict[str, object] = {"skip": True}
World = tuple[Path, Dataset]


def whole(function: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
    """vec dy/dx at one row, in float64."""
    found = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], row)
    return found.double().flatten()


def brute(layer: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([cosine_similarity(whole(layer, row), whole(other, row), dim=0) for row in x])


def bent(width: int, seed: int) -> Callable[[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*shape, generator=random) for shape in ((D, 3 * D), (3 * D, width)))
    return lambda x: torch.nn.functional.gelu(x @ first) @ second


def test_they_are_those_of_whole_matrices() -> None:
    x = torch.randn(6, D)
    torch.testing.assert_close(cosines(bent(7, 0), bent(7, 1), x), brute(bent(7, 0), bent(7, 1), x))
    A, B = torch.randn(2, D, 7).double()
    expected = cosine_similarity(A.flatten(), B.flatten(), dim=0).expand(6)
    torch.testing.assert_close(cosines(lambda x: x @ A.float(), lambda x: x @ B.float(), x), expected)
    torch.testing.assert_close(cosines(bent(7, 0), bent(7, 0), x), torch.ones(6).double())
    torch.testing.assert_close(cosines(bent(7, 0), lambda x: -3 * bent(7, 0)(x), x), -torch.ones(6).double())


def test_of_wide_outputs_some_directions_tell_nearly_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = bent(60, 0), bent(60, 1)
    x = torch.randn(50, D)
    expected = brute(one, lambda x: one(x) + other(x), x)
    monkeypatch.setattr(jacobian, "PROBES", 30)
    assert cosines(one, lambda x: one(x) + other(x), x).mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
    monkeypatch.setattr(jacobian, "PROBES", 60)
    torch.testing.assert_close(cosines(one, lambda x: one(x) + other(x), x), expected)


def test_what_has_no_derivative() -> None:
    x = torch.randn(3, D)
    assert cosines(bent(7, 0), lambda x: 0 * x[:, :7], x).tolist() == [0, 0, 0]
    assert cosines(lambda x: 0 * x[:, :7], bent(7, 0), x).isnan().all()
    assert cosines(bent(7, 0), lambda x: x.detach()[:, :7].round(), x).isnan().all()
    nothing = JacobianCosine(bent(7, 0), lambda x: x.detach()[:, :7])
    nothing.update(Encoded(x, bent(7, 0)(x), None, x[:, :7]))
    assert nothing.result() == {"jacobian_cosine": None}


def test_it_is_taken_at_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobian, "ROWS", 20)
    monkeypatch.setattr(jacobian, "AT_ONCE", 4 * D)
    x = torch.randn(30, D)
    metric = JacobianCosine(bent(7, 0), bent(7, 1))
    for part in x.split(8):
        metric.update(Encoded(part, bent(7, 0)(part), None, bent(7, 1)(part)))
    expected = brute(bent(7, 0), bent(7, 1), x[:20]).mean().item()
    assert metric.result()["jacobian_cosine"] == pytest.approx(expected, abs=1e-5)
    assert metric.details()["jacobian"]["rows"] == 20


# Of a model's MLP


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    with small_stages():
        yield


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small: None) -> World:
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(request.param, root / "model")
    tokens = torch.randint(0, 40, (12, CONTEXT), generator=torch.Generator().manual_seed(0)).numpy()
    config = HarvestConfig(
        model=str(model), layer=(1,), site=("mlp_in", "mlp_out", "mlp_post"), codec="float32", tokens="all",
        validation_tokens="all", batch_tokens=8 * CONTEXT,
    )  # fmt: skip
    made = harvest(config, [token_store(root, tokens)], root, Silent()).stores["train"]
    stores = {one.recipe["site"]: one for one in made}
    return model, Dataset.of(stores["mlp_in"], stores["mlp_out"])


def test_a_models_mlp_is_a_function_of_rows(world: World) -> None:
    model, dataset = world
    x, y = dataset.rows(0, 9)[:2]
    mlp, plain = LanguageModel.boot(str(model)).mlp(1), blocks(plain_model(model))[1].mlp
    torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosines(mlp, lambda x: plain(x[None])[0], x), torch.ones(9).double())


@pytest.mark.parametrize(
    "case",
    [{"arch": "topk"}, {"arch": "jumprelu", "straight_through": "both"}, {"arch": "gated"}, {"arch": "l1"} | SKIP],
    ids=str,
)
def test_a_transcoders_cosine_is_in_its_evaluation(world: World, case: dict[str, object]) -> None:
    model, dataset = world
    config = saes.parse({"d_sae": 24, "b_dec_init": "mean", **SMALL.get(str(case["arch"]), {}), **case})
    sae = saes.create(config, dataset.d_in, dataset.d_out, seed=3)
    x, y = dataset.rows(0, 12)[:2]
    sae.initialise(x, y)
    if sae.W_skip is not None:
        torch.nn.init.normal_(sae.W_skip)
    sae.eval()
    booted = LanguageModel.boot(str(model))
    found = judged(sae, dataset, booted)
    plain = blocks(plain_model(model))[1].mlp
    weights = sae.weights()

    def replacement(row: Tensor) -> Tensor:
        """By the formula, with what is active held as it is."""
        codes = sae.encode(row.detach()).dense().detach()
        p = (row * sae.scale) @ weights.W_enc_rows.T + weights.b_enc
        if case["arch"] == "gated":
            p = (p - weights.b_enc) * sae.get_parameter("r_mag").exp() + sae.get_parameter("b_mag")
        y = p * (codes != 0) @ weights.W_dec
        return (y if sae.W_skip is None else y + (row * sae.scale) @ sae.W_skip) / sae.target_scale

    expected = brute(lambda row: plain(row[None])[0], replacement, x).mean().item()
    assert found == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3


def judged(sae: SAE, dataset: Dataset, booted: LanguageModel) -> float:
    metric = JacobianCosine.of(Subject(sae, mlp=booted.mlp(1)))
    x, y = dataset.rows(0, 12)[:2]
    with torch.no_grad():
        metric.update(Encoded(x, y, None, sae(x)))
    found = metric.result()["jacobian_cosine"]
    assert found is not None
    return found


def test_where_there_is_no_mlp_between_there_is_no_such_figure(world: World) -> None:
    _, dataset = world
    alone = Dataset.of(dataset.inputs)
    sae = saes.create(saes.parse({"arch": "topk", "d_sae": 24, "k": 2}), alone.d_in)
    sae.initialise(alone.rows(0, 64).x)
    assert "jacobian_cosine" not in judge(Subject(sae), alone, alone, EvalConfig(dead_rows=0), Silent()).as_json()
