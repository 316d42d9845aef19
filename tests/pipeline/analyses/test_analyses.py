"""Analyses of plain and variational dictionaries against what is computed by hand, their files and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import done
from support.command_line import sae as typed
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import sae
from sae.cache.errors import SaeError
from sae.pipeline.analyses.analysis import analyses, distribution, quantiles
from sae.pipeline.formats import trained
from sae.pipeline.metrics.figures import meanings
from sae.pipeline.metrics.geometry import pairs
from sae.pipeline.metrics.similarity import correlation
from sae.pipeline.saes.variational import Variational

USUAL = ["activations", "frequency", "geometry", "latent_space", "reconstruction", "similarity", "sparsity"]
D, M = 8, 24


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> sae.Session:
    root = tmp_path_factory.mktemp("analyses")
    return sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)


@pytest.fixture(scope="module")
def runs(lab: sae.Session) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(1500, 12, generator=random).pow(4) @ torch.randn(12, D, generator=random)
    kinds = {
        "topk": sae.TopK(k=3, d_sae=M),
        "iso": sae.VSAEIso(d_sae=M, kl_coefficient=0.1),
        "mix": sae.VSAEMix(d_sae=M, variance="none", input_scale="none"),
        "multi": sae.VSAEMulti(d_sae=M, mean="identity", covariance=((1.0, 0.5), (0.5, 2.0))),
    }
    dataset = lab.dataset(x, validation=0.2)
    return {name: lab.train(kind, dataset, steps=30, batch=128, lr=1e-2, name=name) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def found(lab: sae.Session, runs: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    older = ("activations", "latent_space", "reconstruction", "similarity", "sparsity")
    some = {
        "iso": older,
        "mix": ("latent_space",),
        "multi": ("activations", "latent_space", "sparsity"),
    }  # all of the others
    return {name: lab.analyze(run, *some.get(name, ())) for name, run in runs.items()}


def held_out(lab: sae.Session, run: Any) -> Tensor:
    return trained.dataset_of(run, Path(str(lab.cache))).held_out().sample(10_000).x


def test_every_analysis_has_its_files(found: dict[str, Any], runs: dict[str, Any]) -> None:
    for name, each in found.items():
        assert [*each] == USUAL or name in ("iso", "mix", "multi")
        for what, one in each.items():
            assert one["plot"] == str(runs[name].path / "analysis" / f"{what}.png")
            assert Path(one["plot"]).read_bytes().startswith(b"\x89PNG")
            said = json.loads(Path(one["json"]).read_text())
            told = {key: value for key, value in one.items() if key not in ("json", "plot")}
            assert {key: said[key] for key in told} == json.loads(json.dumps(told))
            assert {*told} - {"details"} <= meanings().keys() | analyses()[what].meanings.keys()
        assert runs[name].check() == []


@pytest.mark.parametrize("name", ["topk", "iso"])
def test_figures_of_rows_by_hand(name: str, lab: sae.Session, runs: dict[str, Any], found: dict[str, Any]) -> None:
    dictionary, x, told = runs[name].load(), held_out(lab, runs[name]), found[name]
    f = dictionary.encode(x).dense().double()
    y_hat = dictionary(x).double()
    sparsity, activations = told["sparsity"], told["activations"]
    assert sparsity["rows"] == len(x) == 305
    assert sparsity["l0"] == pytest.approx((f != 0).sum(1).double().mean().item())
    for share, value in sparsity["details"]["l0_by_threshold"].items():
        at = float(share) * f.abs().amax(1, keepdim=True)
        assert value == pytest.approx((f.abs() > at).sum(1).double().mean().item(), abs=0.02)
    assert sparsity["details"]["density"] == pytest.approx((f != 0).double().mean(0).tolist(), rel=1e-5)
    error, spread = (x - y_hat).square(), (x.double() - x.double().mean(0)).square()
    assert told["reconstruction"]["fvu"] == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-5)
    by_feature = (1 - error.sum(0) / spread.sum(0)).tolist()
    assert told["reconstruction"]["details"]["explained_variance_by_feature"] == pytest.approx(by_feature, abs=1e-5)
    median = (error.sum(1) / x.double().square().sum(1)).median().item()
    assert told["reconstruction"]["row_error_median"] == pytest.approx(median, rel=1e-4)
    assert activations["details"]["most"] == pytest.approx(f.amax(0).tolist(), rel=1e-5)
    assert activations["mean_when_active"] == pytest.approx(f[f != 0].mean().item(), rel=1e-5)
    strongest = activations["details"]["strongest"]
    energy = f.square().sum(0) * dictionary.W_dec.double().square().sum(1)
    assert [one["feature"] for one in strongest] == energy.argsort(descending=True)[: len(strongest)].tolist()
    assert strongest[0]["energy"] == pytest.approx((energy.max() / energy.sum()).item(), rel=1e-5)
    means = f if name == "topk" else f * trained.in_training(runs[name]).target_scale  # type: ignore[union-attr]
    variance = means.var(0, correction=0)
    assert told["latent_space"]["active_units"] == (variance > 0.01).sum()
    assert told["latent_space"]["details"]["variance"] == pytest.approx(variance.tolist(), rel=1e-3, abs=1e-6)
    centred = means - means.mean(0)
    shares = torch.linalg.svdvals(centred).square()
    assert told["latent_space"]["details"]["variance_of_components"][:5] == pytest.approx(
        (shares / shares.sum())[:5].tolist(), rel=1e-3
    )


def test_similarity_by_hand(runs: dict[str, Any], found: dict[str, Any]) -> None:
    table = torch.nn.functional.normalize(runs["iso"].load().W_dec, dim=1)
    cosines = (table @ table.T).fill_diagonal_(-2)
    told = found["iso"]["similarity"]
    assert told["largest_cosine"] == pytest.approx(cosines.max().item(), rel=1e-5)
    assert told["details"]["nearest"] == cosines.argmax(1).tolist()
    first = told["details"]["most_alike"][0]
    assert cosines[first["latents"][0], first["latents"][1]].item() == pytest.approx(first["cosine"], rel=1e-5)
    assert len({tuple(one["latents"]) for one in told["details"]["most_alike"]}) == 16
    assert "true_to_learned" not in told
    assert pairs(torch.ones(1, 3)).largest.shape == (0,)


def test_the_kl_of_the_rows_is_torchs(lab: sae.Session, runs: dict[str, Any], found: dict[str, Any]) -> None:
    training = trained.in_training(runs["iso"])
    assert isinstance(training, Variational)
    told, x = found["iso"]["latent_space"], held_out(lab, runs["iso"])
    posterior = training.posterior_of(x)
    assert posterior.logvar is not None
    each = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0))
    assert told["details"]["kl_by_latent"] == pytest.approx(each.mean(0).tolist(), rel=1e-4)
    assert told["kl"] == pytest.approx(each[:256].sum(1).mean().item(), rel=1e-4)
    assert told["kl_sampled"] == pytest.approx(told["kl"], rel=0.01)
    assert told["mean_sigma"] == pytest.approx((0.5 * posterior.logvar).exp().mean().item(), rel=1e-4)
    assert told["collapsed_share"] == (each.mean(0) < 0.01).double().mean()


def test_what_there_is_not_is_null(found: dict[str, Any]) -> None:
    plain, still = found["topk"]["latent_space"], found["mix"]["latent_space"]
    for one in (plain, still):
        assert one["kl"] is one["kl_sampled"] is one["mean_sigma"] is one["collapsed_share"] is None
        assert one["active_units"] is not None and one["bend"] is not None
    assert plain["prior_frobenius"] is None and still["prior_frobenius"] is not None
    kinds = [pair["kind"] for pair in still["details"]["pairs"]]
    assert kinds == ["correlated", "correlated", "anticorrelated"]
    assert all(sum(pair[n] for n in ("none", "one", "both")) == pytest.approx(1) for pair in still["details"]["pairs"])
    linear = found["multi"]["latent_space"]
    assert linear["bend"] < 1e-5, "an encoder without a ReLU is linear between any two rows"
    assert found["multi"]["sparsity"]["l0"] == M and found["multi"]["activations"]["negative_share"] > 0.1


def test_the_priors_covariances() -> None:
    """By draws of the priors themselves."""
    random = torch.Generator().manual_seed(0)
    shape = {"d_sae": 8, "prior_shift": 2.0, "prior_std": 0.5, "presence": 0.3}
    made: Any = sae.pipeline.saes.create(sae.VSAEMix(correlated_pairs=1, anticorrelated_pairs=1, **shape), D)
    z = torch.randn(200_000, 4, generator=random)
    there = torch.rand(200_000, 2, generator=random) < 0.3
    side = torch.rand(200_000, generator=random) < 0.5
    at = torch.stack([torch.ones(200_000), torch.ones(200_000), side.float(), (~side).float()], 1)
    z = torch.where(there.repeat_interleave(2, dim=1), 2.0 * at + 0.5 * z, z)
    torch.testing.assert_close(made.prior_covariance(4), z.double().T.cov(), atol=0.02, rtol=0)
    assert torch.equal(made.prior_covariance(8)[4:, 4:], torch.eye(4).double()) and made.prior_covariance(3).shape == (
        3,
        3,
    )
    equal: Any = sae.pipeline.saes.create(sae.VSAEMulti(d_sae=4, correlation=0.25), D)
    assert equal.prior_covariance(2).tolist() == [[1, 0.25], [0.25, 1]]
    given: Any = sae.pipeline.saes.create(sae.VSAEMulti(d_sae=4, covariance=((2.0, 0.5), (0.5, 1.0))), D)
    assert given.prior_covariance(3).tolist() == [[2, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]


def test_at_the_command_line(lab: sae.Session, runs: dict[str, Any]) -> None:
    where = f"--cache {lab.cache} --runs {lab.runs} --device cpu"
    told = done(f"analyze topk latent-space sparsity --rows 100 --json {where}").json
    assert [*told["analyses"]] == ["latent_space", "sparsity"] and told["run"] == str(runs["topk"].path)
    assert told["analyses"]["sparsity"]["rows"] == 100
    shown = done(f"analyze iso similarity {where}").out
    assert "welch_bound" in shown and "similarity.png" in shown and "mean |cosine| of two decoder rows" in shown
    assert "kl_sampled" not in done(f"analyze topk latent-space {where}").out  # of a variational one alone
    names = [one["name"] for one in done("list --json").json["analyses"]]
    assert names == [*analyses()] == sorted([*USUAL, "attribution", "clusters", "emergence", "map"])
    wrong = typed(f"analyze topk sparsty {where}")
    assert wrong.code == 2 and "sparsty: no such analysis; did you mean sparsity?" in wrong.complaint


def test_variances_that_are_not_there_are_said(lab: sae.Session, runs: dict[str, Any]) -> None:
    checkpoint = runs["iso"].path / "checkpoint.safetensors"
    checkpoint.rename(checkpoint.with_suffix(".away"))
    try:
        with pytest.raises(
            SaeError, match=r"variances of its latents are in checkpoint\.safetensors, which is not there"
        ):
            lab.analyze(runs["iso"], "latent_space")
        assert lab.analyze(runs["iso"], "sparsity", rows=50)["sparsity"]["rows"] == 50
    finally:
        checkpoint.with_suffix(".away").rename(checkpoint)


def test_numbers_of_nothing() -> None:
    assert quantiles(torch.empty(0)) is None and quantiles(torch.tensor([2.0])) == dict.fromkeys(
        ("0.05", "0.25", "0.5", "0.75", "0.95"), 2.0
    )
    assert not distribution("x", torch.tensor([torch.nan])).there
    assert distribution("x", torch.tensor([3.0, 3.0])).curves == {"": [(3.0, 2)]}
    drawn = distribution("x", torch.linspace(0, 1, 101)).curves[""]
    assert sum(count for _, count in drawn if count) == 101
    assert correlation(torch.ones(3), torch.arange(3.0)) is None
    assert correlation(torch.arange(3.0), -torch.arange(3.0)) == pytest.approx(-1)
