"""Analyses find what was planted: clusters, communities, drifting rates, a latent's birth, effects on predictions."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import done
from support.command_line import sae as typed
from support.small_runs import planted_store, settings, stop_at
from torch import Tensor
from torch.nn.functional import normalize

import sae
from sae.cache import catalogue
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.analyses.attribution import ablated, chosen_of, derivative, integrated
from sae.pipeline.analyses.clusters import NOISE, labelled, silhouette, stability
from sae.pipeline.analyses.emergence import emerged
from sae.pipeline.analyses.frequency import Frequency, apart, ranks, trend
from sae.pipeline.analyses.geometry import angles_of_pairs, spectrum
from sae.pipeline.analyses.map import communities, embedded
from sae.pipeline.formats import trained
from sae.pipeline.interpret.together import Together
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Latents
from sae.pipeline.train.stage import open_run, run_name, train


def directions(seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Three tight clusters of 20 directions each in 16 dimensions, and which is in which."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(16, 3, generator=random)).Q.T
    rows = centres.repeat_interleave(20, 0) + 0.05 * torch.randn(60, 16, generator=random)
    return normalize(rows, dim=1), np.repeat(np.arange(3), 20)


# Clusters and communities


@pytest.mark.parametrize("kind", ["kmeans", "hdbscan"])
def test_planted_clusters_are_found_and_found_again(kind: str) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    unit, planted = directions()
    labels = labelled(unit, kind, 3)
    assert sklearn.adjusted_rand_score(planted, labels) == 1
    assert stability(unit, kind, 3) == 1
    cosines = (1 - unit @ unit.T).double().numpy()
    slow = []
    for i in range(60):
        means = [cosines[i][(planted == one) & (np.arange(60) != i)].mean() for one in range(3)]
        inside, outside = means[planted[i]], min(means[: planted[i]] + means[planted[i] + 1 :])
        slow.append((outside - inside) / max(inside, outside))
    np.testing.assert_allclose(silhouette(unit, labels), slow, atol=1e-5)
    assert np.isnan(silhouette(unit, np.full(60, NOISE))).all()


def test_latents_that_fire_together_are_a_community() -> None:
    random = np.random.default_rng(0)
    which = random.integers(3, size=400)  # each row has the four latents of one of three groups, and one of any
    on = np.zeros((400, 13), bool)
    for row, group in enumerate(which):
        on[row, 4 * group : 4 * group + 4] = True
        on[row, random.integers(12)] = True
    together = Together(13, 0)
    rows, latents = torch.from_numpy(on).nonzero(as_tuple=True)
    together.add(rows, latents, np.arange(400))
    assert communities(together.partners(12)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # 13 never fires


def test_a_map_keeps_clusters_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, planted = directions()
    monkeypatch.setattr("sae.pipeline.analyses.map.find_spec", lambda _: None)
    places, by = embedded(unit)
    assert by == "pca" and places.shape == (60, 2)
    centred = (unit - unit.mean(0)).double()
    energy = torch.linalg.svdvals(centred)[:2].square().sum().item()
    assert places.double().square().sum().item() == pytest.approx(energy, rel=1e-5)
    centres = torch.stack([places[planted == one].mean(0) for one in range(3)])
    assert torch.cdist(places, centres).argmin(1).tolist() == planted.tolist()
    assert embedded(unit[:1])[0].tolist() == [[0, 0]]


@pytest.mark.slow
def test_umaps_map_keeps_clusters_apart() -> None:
    pytest.importorskip("umap")
    unit, planted = directions()
    places, by = embedded(unit)
    assert by == "umap" and torch.equal(places, embedded(unit)[0])
    centres = torch.stack([places[planted == one].mean(0) for one in range(3)])
    assert torch.cdist(places, centres).argmin(1).tolist() == planted.tolist()


# Frequency


def test_rates_that_drift_are_told_from_rates_that_stay() -> None:
    """Latent 0 fires twice as often in the second half; the others stay as they are."""
    random = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.02, 0.3, 12).repeat(4000, 1)
    rates[:2000, 0], rates[2000:, 0] = 0.1, 0.2
    fires = (torch.rand(4000, 12, generator=random) < rates).float()

    def batches(most: int) -> Any:
        return (SimpleNamespace(latents=Latents.of_dense(part), x=part) for part in fires.split(most))

    subject: Any = SimpleNamespace(
        rows=4000, sae=SimpleNamespace(d_sae=12), batches=batches, config=AnalyzeConfig(windows=8, top=3)
    )
    found = Frequency().find(subject)
    by_window = fires.double().view(8, 500, 12).mean(1).numpy()
    pearson = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(by_window)]
    assert found.details["pearson_by_window"] == pytest.approx(pearson)
    assert found.details["rates"] == pytest.approx(fires.mean(0).tolist(), rel=1e-5)
    assert found.figures["trend"] == pytest.approx(np.polyfit(range(8), by_window.mean(1), 1)[0] / by_window.mean())
    assert found.figures["windows"] == 8 and found.figures["drifting"] == 1
    assert found.details["drift"][0]["feature"] == 0 and found.details["drift"][0]["z"] > 5
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    assert trend(torch.ones(1)) is None and trend(torch.zeros(3)) is None
    assert apart(*(torch.tensor([value]).double() for value in (0, 10, 0, 10))).tolist() == [0]


# Geometry


def test_angles_and_dimensions_of_known_directions() -> None:
    unit = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0.5**0.5, 0.5**0.5, 0]])
    angles = {2 * i: count for i, count in enumerate(angles_of_pairs(unit).tolist()) if count}
    # 90, 90 | 180 | 45, 45 | 135: the last bin has its end, too
    assert sum(angles.values()) == 6 and angles[44] == 2 and angles[134] == 1 and angles[178] == 1
    shares = spectrum(torch.eye(3)[:2])
    assert shares.tolist() == pytest.approx([0.5, 0.5, 0])


# Emergence


def test_a_latent_emerges_where_its_direction_stays() -> None:
    cosines = torch.tensor([[0.1, 0.95, 0.2], [0.95, 0.3, 0.5], [0.92, 0.91, 0.8], [1, 1, 1]])
    assert emerged(cosines).tolist() == [1, 2, 3]


def test_snapshots_are_kept_at_log_spaced_steps_and_survive_a_kill(tmp_path: Path) -> None:
    dataset = Dataset.of(planted_store(tmp_path))
    config = settings(snapshots=5)
    assert run_name(settings(), dataset) != run_name(config, dataset)
    runs = {name: open_run(config, dataset, tmp_path / "runs", name, resume=False) for name in ("whole", "cut")}
    train([runs["whole"]], dataset, Silent(), device="cpu")
    with pytest.raises(Interrupted):
        train([runs["cut"]], dataset, stop_at(13), device="cpu")
    train([open_run(config, dataset, tmp_path / "runs", "cut", resume=True)], dataset, Silent(), device="cpu")
    assert runs["whole"].snapshots() == runs["cut"].snapshots() == [1, 3, 6, 16, 40]
    for step in runs["whole"].snapshots():
        one, other = (runs[name].load_snapshot(step) for name in ("whole", "cut"))
        assert all(torch.equal(one[name], other[name]) for name in ("decoder", "encoder", "rate"))
    last, weights = runs["whole"].load_snapshot(40), runs["whole"].load_weights()[0]
    torch.testing.assert_close(last["decoder"].float(), normalize(weights["W_dec"], dim=1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(last["encoder"].float(), normalize(weights["W_enc"].T, dim=1), atol=1e-3, rtol=1e-3)
    path = runs["cut"].path / "snapshots" / "000000006.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert len(runs["cut"].check()) == 1 and runs["whole"].check() == []


# Attribution


def test_gradients_are_ablations_where_the_measure_is_linear() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.rand(30, 12, generator=random, dtype=torch.float64) * (torch.rand(30, 12, generator=random) < 0.3)
    effect, bent = torch.randn(30, 12, generator=random).double(), torch.randn(12, 4, generator=random).double()

    def linear(f: Tensor) -> Tensor:
        return (f * effect).sum() + 3

    def curved(f: Tensor) -> Tensor:
        return (f @ bent).tanh().sum()

    for measure, exact in ((linear, True), (curved, False)):
        whole, gradient = derivative(measure, values)
        estimate = (values * gradient).sum(0)
        effects = torch.tensor([whole - float(measure(ablated(values, i))) for i in range(12)]).double()
        assert torch.allclose(estimate, effects, atol=1e-5) is exact
        added = (values * integrated(measure, values)).sum().item()
        assert added == pytest.approx(whole - float(measure(torch.zeros_like(values))), abs=0.02)
    chosen = chosen_of(torch.arange(12.0), torch.arange(12) % 2 == 1, 4)
    assert chosen.tolist() == [11, 9, 7, 1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[sae.Session, Any]:
    """A dictionary of the embedded model, with snapshots."""
    root = tmp_path_factory.mktemp("text")
    lab = sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)
    lab.tokenize(preset="tiny", tokens=30_000, validation_tokens=8_000, validation=0.3)
    (rows,) = lab.harvest(preset="tiny", layer=1, site=["mlp_out"], tokens=16_000, validation_tokens=4_096).values()
    return lab, lab.train(sae.TopK(k=4, d_sae=64), rows, steps=40, batch=256, lr=3e-3, snapshots=4, name="text")


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["ce", "logit"])
def test_effects_on_a_language_model_are_those_of_editing_its_latents(text: Any, measure: str) -> None:
    """By another way: `attach(...).edit`, and cross-entropies as torch has them."""
    lab, run = text
    found = lab.analyze(run, "attribution", tokens=128, ablated=4, measure=measure)["attribution"]
    held_out = trained.dataset_of(run, Path(str(lab.cache))).held_out()
    model = sae.LanguageModel.boot("tiny", device="cpu")
    assert held_out.provenance.text is not None
    tokens = catalogue.of_recipe(Path(str(lab.cache)), TokenStore, held_out.provenance.text.recipe)
    assert tokens is not None
    begin, lengths = tokens.recipe["tokenizer"]["begin"], tokens.lengths(0, -(-128 // tokens.context_length))
    contexts = -(-128 // tokens.context_length)
    ids = torch.from_numpy(tokens.contexts(0, contexts))
    rows = rule_of(held_out.inputs[0]).mask(ids.numpy(), lengths, begin)
    counted = torch.from_numpy(rows[:, :-1] & (np.arange(1, ids.shape[1]) < lengths[:, None]))
    others = model.logits(ids)[:, :-1].scatter(2, ids[:, 1:, None], -torch.inf).argmax(2)

    def mean(logits: Tensor) -> float:
        told = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        rival = logits[:, :-1].gather(2, others[..., None])[..., 0]
        each = logits[:, :-1].logsumexp(2) - told if measure == "ce" else told - rival
        return each[counted].double().mean().item()

    def without(latent: int | None) -> float:
        keep = torch.from_numpy(rows)

        def edit(values: Tensor) -> Tensor:
            new = values.clone()
            if latent is None:
                new[keep] = 0
            else:
                new[..., latent] = torch.where(keep, 0.0, new[..., latent])
            return new

        with sae.attach(model, run.load(), at="1.mlp_out").edit(edit):
            return mean(model.logits(ids))

    whole = mean(model.logits(ids))
    assert found["measure_clean"] == pytest.approx(whole, abs=1e-5)
    assert found["measure_without_latents"] == pytest.approx(without(None), abs=1e-5)
    assert found["integrated_sum"] == pytest.approx(whole - without(None), abs=0.05 * abs(whole - without(None)) + 1e-3)
    assert len(found["details"]["latents"]) == 4
    for one in found["details"]["latents"]:
        assert one["ablation"] == pytest.approx(whole - without(one["feature"]), abs=2e-5)
    assert found["spearman_gradient"] > 0.5


@pytest.mark.slow
def test_what_is_asked_for_by_name_on_a_dictionary_of_text(text: Any) -> None:
    lab, run = text
    names = ("emergence", "clusters", "map", "frequency", "geometry")
    found = lab.analyze(run, *names, clusters=3, rows=2000)
    assert [*found] == [*names] and run.check() == []
    for one in found.values():
        assert Path(one["plot"]).read_bytes().startswith(b"\x89PNG") and json.loads(Path(one["json"]).read_text())
    emergence = found["emergence"]
    assert emergence["details"]["steps"] == run.snapshots() == [1, 3, 12, 40]
    assert emergence["details"]["tokens_are"] == "tokens" and emergence["details"]["tokens_kept"][-1] == 1
    assert emergence["details"]["cluster_ari"][-1] == 1 and emergence["details"]["mean_cosine"][-1] == pytest.approx(1)
    assert len(found["clusters"]["details"]["labels"]) == len(found["map"]["details"]["places"]) == 64
    assert found["geometry"]["orthogonality"] == pytest.approx(lab.evaluate(run, cross_entropy=False)["orthogonality"])


def test_what_an_analysis_lacks_is_said_in_a_line(tmp_path: Path) -> None:
    x = torch.rand(400, 6, generator=torch.Generator().manual_seed(0))
    lab = sae.Session(tmp_path / "cache", tmp_path / "runs", device="cpu", offline=True, progress=False)
    lab.train(sae.TopK(k=2, d_sae=8), lab.dataset(x, validation=0.2), steps=2, batch=64, name="plain")
    for name, says in (
        (
            "emergence",
            "training kept no snapshots of it; train again with --set train.snapshots=12, under another --name",
        ),
        ("attribution", "are of no one place in a language model; leave it out"),
        ("clusters", "--clusters 10: plain has 8 directions; ask for fewer than that"),
    ):
        answer = typed("analyze", "plain", name, "--cache", tmp_path / "cache", "--runs", tmp_path / "runs")
        assert answer.code == 2 and says in answer.complaint
    usual = done("analyze", "plain", "--cache", tmp_path / "cache", "--runs", tmp_path / "runs", "--json").json
    assert {"frequency", "geometry"} < {*usual["analyses"]} and "clusters" not in usual["analyses"]
    with pytest.raises(SaeError, match="snapshots"):
        lab.train(sae.VAE(), lab.dataset(x), steps=2, batch=64, snapshots=3)
