"""The judge judged: dictionaries whose scores are known, and everything counted again by the plain model."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from support.harvesting import harvest
from support.small_models import (
    BEGIN,
    CONTEXT,
    VOCAB,
    WIDTH,
    blocks,
    plain_model,
    plain_values,
    row_places,
    save_model,
    small_stages,
    token_store,
)
from support.watching import watched
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.massive import beyond_usual
from sae.cache.runs import EVALUATION, LATENTS, Run
from sae.cache.store.notes import write_note
from sae.cache.store.store import HINTS
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.places import TokenPlaces
from sae.pipeline.evaluate.rows_passes import judge_rows, search_rows
from sae.pipeline.evaluate.stage import EvalConfig, evaluate, evaluate_all, expect_evaluated, expect_one_model
from sae.pipeline.evaluate.subjects import Judged, Site, Splice
from sae.pipeline.evaluate.token_passes import judge_tokens
from sae.pipeline.formats import trained
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.metrics.downstream import Downstream, DownstreamScores
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.report.neuronpedia import found_features
from sae.pipeline.report.stage import report
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import create, parse, placement
from sae.pipeline.saes.contract import LayerByLayer
from sae.pipeline.train.stage import TrainConfig, open_run, train

DIRECTIONS = {
    "orthogonality", "jl", "encoder_decoder_cosine", "largest_cosine", "mean_largest_cosine",
    "mean_largest_cosine_chance", "orthogonality_chance", "welch_bound",
}  # what does not depend on rows  # fmt: skip
PROMISED = {
    "fvu", "explained_variance", "mse", "l0", "sparsity", "dense_share", "rate_q25", "rate_median", "rate_q75",
    "dead_fraction", "ce_clean", "ce_spliced", "ce_degradation", "ce_zero", "ce_mean", "ce_recovered_zero",
    "ce_recovered_mean", "kl", "kl_score", "explained_variance_features", "cosine", "l2_ratio", "relative_bias",
    "normalised_mse", "l0_relative", "l1", "hoyer", "rows", "row_error", "dead_rows", "tokens", "details", *DIRECTIONS,
    "bits", "active_parameters", "codebook_usage", "perplexity", "active_units",
}  # fmt: skip
OF_CODES = {"codebook_usage", "perplexity", "active_units"}  # which sparse dictionaries have none of
D_SAE, D_LATENTS = 2 * WIDTH, 64  # of dictionaries that are made, and of the one that is trained
SITES = [(0, "resid_post"), (1, "mlp_out"), (1, "resid_mid"), (0, "mlp_post")]
CONFIG = EvalConfig(tokens="all", dead_rows=64, batch_tokens=5 * CONTEXT)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        yield patch


def spoken(model: Any, contexts: int, seed: int) -> np.ndarray:
    """Tokens [contexts, T] drawn from the model itself, so that replacing its activations costs something.

    Documents begin at the start and once in the middle of a context.
    """
    torch.manual_seed(seed)
    tokens = torch.full((contexts, CONTEXT), BEGIN)
    with torch.no_grad():
        for place in range(1, CONTEXT):
            chances = (3 * model(tokens[:, :place]).logits[:, -1]).softmax(1)
            tokens[:, place] = torch.multinomial(chances, 1)[:, 0]
            tokens[place::CONTEXT, place] = BEGIN
    return tokens.numpy()


@dataclass(frozen=True)
class World:
    """A model, what it was run on, and what was kept."""

    root: Path
    model: Path
    training: np.ndarray
    held_out: np.ndarray
    lengths: np.ndarray

    def store(self, layer: int, site: str, split: str = "train") -> ActivationStore:
        stores = [ActivationStore(path) for path in catalogue.folders(self.root, "activations")]
        (found,) = [s for s in stores if (s.recipe["layer"], s.recipe["site"], s.split) == (layer, site, split)]
        return found

    def tokens(self) -> TokenStore:
        (found,) = [s for p in catalogue.folders(self.root, "tokens") for s in [TokenStore(p)] if s.split != "train"]
        return found

    def booted(self) -> LanguageModel:
        return LanguageModel.boot(str(self.model))


def make_world(root: Path, model: Path) -> World:
    plain = plain_model(model)
    training, held_out = spoken(plain, 40, 1), spoken(plain, 30, 2)
    lengths = np.full(30, CONTEXT)
    lengths[3::5] = np.random.default_rng(3).integers(2, CONTEXT, len(lengths[3::5]))
    for context, length in enumerate(lengths):
        held_out[context, length:] = BEGIN
    stores = [
        token_store(root, training, packing="document"),
        token_store(root, held_out, lengths, packing="document", split="validation"),
    ]
    config = HarvestConfig(
        model=str(model), layer=(0, 1), site=("resid_post", "mlp_out", "resid_mid", "mlp_post"), codec="float32",
        tokens="all", validation_tokens="all", batch_tokens=8 * CONTEXT,
    )  # fmt: skip
    harvest(config, stores, root, Silent())
    return World(root, model, training, held_out, lengths)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> World:
    root = tmp_path_factory.mktemp("gpt2")
    return make_world(root, save_model("gpt2", root / "gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> World:
    root = tmp_path_factory.mktemp("llama")
    return make_world(root, save_model("llama", root / "llama"))


# Counted again


def counted(world: World) -> list[tuple[int, int]]:
    """(context, place) of the predictions that count: made from a token that is a row, of a token that is real."""
    return [
        divmod(place, CONTEXT)
        for place in row_places(world.held_out, world.lengths)
        if place % CONTEXT + 1 < world.lengths[place // CONTEXT]
    ]


@torch.no_grad()
def plain_logits(
    world: World, layer: int, site: str, new: Callable[[Tensor], Tensor] | None, places: list[int] | None = None
) -> Tensor:
    """Log-probabilities [contexts, T, vocabulary] of the plain model, with the rows (or some) at a site replaced."""
    model = plain_model(world.model)
    block = blocks(model)[layer]
    rows = torch.zeros(world.held_out.shape, dtype=torch.bool)
    rows.view(-1)[row_places(world.held_out, world.lengths) if places is None else places] = True

    def replace(_module: Any, _args: Any, out: Any) -> Any:
        value = (out[0] if isinstance(out, tuple) else out).clone()
        assert new is not None
        value[rows] = new(value[rows])
        return (value, *out[1:]) if isinstance(out, tuple) else value

    if new is not None:
        (block if site == "resid_post" else block.mlp).register_forward_hook(replace)
    return model(torch.from_numpy(world.held_out)).logits.double().log_softmax(-1)


def spliced_into(
    world: World, sae: Callable[[Tensor], Tensor], dataset: Dataset, mean: Tensor, metric: Downstream,
    config: EvalConfig = CONFIG, tokens: TokenStore | None = None,
) -> None:  # fmt: skip
    """Show a metric what a function of rows costs in the place of a dataset's."""
    one = Splice(sae=sae, site=Site(dataset, mean), metrics=[metric])
    judge_tokens([one], world.booted(), tokens or world.tokens(), config, Silent())
    if one.error is not None:
        raise one.error


def scores(
    sae: Callable[[Tensor], Tensor], world: World, store: ActivationStore, mean: Tensor, config: EvalConfig = CONFIG,
    largest: float | None = None, tokens: TokenStore | None = None,
) -> DownstreamScores:  # fmt: skip
    """What splicing costs, with everything in `details`."""
    metric = Downstream()
    dataset = Dataset.of(store).kept_up_to(None if largest is None else (largest,))
    spliced_into(world, sae, dataset, mean, metric, config, tokens)
    return metric.scores()["sae"]


def bent(x: Tensor) -> Tensor:
    """A dictionary of sorts: it changes every row, each by itself."""
    return 0.8 * x + 0.1 * x.abs() - 0.05


@pytest.mark.parametrize(("layer", "site"), [(0, "resid_post"), (1, "mlp_out")])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_cross_entropies_equal_the_plain_models(
    request: pytest.FixtureRequest, kind: str, layer: int, site: str
) -> None:
    """Every prediction that is stated to count, and no other; the mean is that of the training rows."""
    world: World = request.getfixturevalue(kind)
    store = world.store(layer, site, "validation")
    training = world.store(layer, site)
    mean = training.rows(0, training.n_rows).double().mean(0).float()
    found = scores(bent, world, store, mean)
    places = counted(world)
    assert (found.tokens, found.contexts) == (len(places), len(world.held_out))
    clean = plain_logits(world, layer, site, None)

    def ce(chances: Tensor) -> float:
        return float(np.mean([-chances[c, p, world.held_out[c, p + 1]] for c, p in places]))

    def kl(chances: Tensor) -> float:
        return float(np.mean([(clean[c, p].exp() * (clean[c, p] - chances[c, p])).sum() for c, p in places]))

    spliced = plain_logits(world, layer, site, bent)
    zero = plain_logits(world, layer, site, torch.zeros_like)
    at_mean = plain_logits(world, layer, site, lambda x: mean.expand_as(x))
    assert found.ce_zero is not None and found.ce_mean is not None
    assert found.recovered_zero is not None and found.recovered_mean is not None
    assert found.ce_clean.value == pytest.approx(ce(clean), abs=1e-6)
    assert found.ce.value == pytest.approx(ce(spliced), abs=1e-6)
    assert found.ce_zero.value == pytest.approx(ce(zero), abs=1e-6)
    assert found.ce_mean.value == pytest.approx(ce(at_mean), abs=1e-6)
    assert found.kl.value == pytest.approx(kl(spliced), abs=1e-6)
    for recovered, baseline in ((found.recovered_zero, zero), (found.recovered_mean, at_mean)):
        expected = (ce(baseline) - ce(spliced)) / (ce(baseline) - ce(clean))
        assert recovered.value == pytest.approx(expected, abs=1e-4)
    assert len({ce(clean), ce(spliced), ce(zero), ce(at_mean)}) == 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transcoder_is_spliced_at_its_target(request: pytest.FixtureRequest, kind: str) -> None:
    """What it makes of the rows of one site stands at the other; zero and the mean are those of the other, too."""
    world: World = request.getfixturevalue(kind)
    read, write = world.store(0, "resid_post", "validation"), world.store(1, "mlp_out", "validation")
    rows = plain_values(world.model, world.held_out)[0, "resid_post"].reshape(-1, WIDTH)
    made = bent(rows[row_places(world.held_out, world.lengths)])
    mean = torch.linspace(-1, 1, WIDTH)
    metric = Downstream()
    dataset = Dataset.of(read, write)
    spliced_into(world, bent, dataset, mean, metric)
    found, places = metric.scores()["sae"], counted(world)

    def ce(new: Callable[[Tensor], Tensor]) -> float:
        chances = plain_logits(world, 1, "mlp_out", new)
        return float(np.mean([-chances[c, p, world.held_out[c, p + 1]] for c, p in places]))

    assert found.tokens == len(places) and found.ce_zero is not None and found.ce_mean is not None
    assert found.ce.value == pytest.approx(ce(lambda _: made), abs=1e-6)
    assert found.ce_zero.value == pytest.approx(ce(torch.zeros_like), abs=1e-6)
    assert found.ce_mean.value == pytest.approx(ce(lambda x: mean.expand_as(x)), abs=1e-6)
    assert len({found.ce.value, found.ce_zero.value, found.ce_mean.value, found.ce_clean.value}) == 4
    norms = [store.norms(0, store.n_rows) for store in (read, write)]
    limits = tuple(float(np.quantile(one, 0.8)) for one in norms)
    kept = np.logical_and(*(one <= most for one, most in zip(norms, limits, strict=True)))
    positions = {*read.positions(0, read.n_rows)[kept].tolist()}
    limited = Downstream()
    spliced_into(world, bent, dataset.kept_up_to(limits), mean, limited)
    assert limited.scores()["sae"].tokens == sum(c * CONTEXT + p in positions for c, p in places) < len(places)


def test_positions_that_training_left_out_are_left_alone(gpt2: World) -> None:
    """Those above the largest norm keep their activations, and what they predict does not count."""
    store = gpt2.store(0, "resid_post", "validation")
    norms, positions = store.norms(0, store.n_rows), store.positions(0, store.n_rows)
    largest = float(np.quantile(norms, 0.7))
    kept = {*positions[norms <= largest].tolist()}
    assert 0 < len(kept) < len(positions)
    found = scores(bent, gpt2, store, torch.ones(WIDTH), largest=largest)
    places = [(c, p) for c, p in counted(gpt2) if c * CONTEXT + p in kept]
    assert found.tokens == len(places)
    for estimate, new in ((found.ce_clean, None), (found.ce, bent), (found.ce_zero, torch.zeros_like)):
        chances = plain_logits(gpt2, 0, "resid_post", new, sorted(kept))
        assert estimate is not None
        assert estimate.value == pytest.approx(
            float(np.mean([-chances[c, p, gpt2.held_out[c, p + 1]] for c, p in places])), abs=1e-6
        )


def test_what_is_left_alone_is_not_counted(gpt2: World) -> None:
    """Begin tokens, first tokens and padding keep their activations, and what they predict has no say."""
    places = counted(gpt2)
    assert 0 < len(places) < len(row_places(gpt2.held_out, gpt2.lengths)) < gpt2.held_out.size
    assert all(p > 0 and gpt2.held_out[c, p] != BEGIN and p + 1 < gpt2.lengths[c] for c, p in places)
    assert any(gpt2.held_out[c, p + 1] == BEGIN for c, p in places)  # the end of a document is predicted, too
    seen = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    store = gpt2.store(1, "mlp_out", "validation")
    scores(keep, gpt2, store, torch.zeros(WIDTH))
    rows = torch.cat(seen)
    order = store.positions(0, store.n_rows).argsort()
    torch.testing.assert_close(rows, store.rows(0, store.n_rows)[order], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("batch_tokens", [1, 7 * CONTEXT, 1000 * CONTEXT])
def test_the_size_of_a_batch_does_not_matter(gpt2: World, batch_tokens: int) -> None:
    store = gpt2.store(0, "resid_post", "validation")
    expected = scores(bent, gpt2, store, torch.ones(WIDTH))
    found = scores(bent, gpt2, store, torch.ones(WIDTH), EvalConfig(tokens="all", batch_tokens=batch_tokens))
    assert found.ce.value == pytest.approx(expected.ce.value, abs=1e-6)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize(("tokens", "contexts"), [(1, 1), (CONTEXT, 1), (CONTEXT + 1, 2), (10**9, 30)])
def test_fewer_tokens_are_whole_contexts(gpt2: World, tokens: int, contexts: int) -> None:
    store = gpt2.store(0, "resid_post", "validation")
    found = scores(bent, gpt2, store, torch.ones(WIDTH), EvalConfig(tokens=tokens))
    assert found.contexts == contexts
    assert found.tokens == len([c for c, _ in counted(gpt2) if c < contexts])


def test_tokens_of_which_none_counts(gpt2: World, tmp_path: Path) -> None:
    empty = gpt2.held_out.copy()
    empty[0, 1:] = BEGIN
    tokens = token_store(tmp_path, empty, split="validation", packing="document", seed=5)
    store = gpt2.store(0, "resid_post", "validation")
    with pytest.raises(SaeError, match=r"^tokens = 3: none of their predictions counts; judge on more$"):
        scores(bent, gpt2, store, torch.ones(WIDTH), EvalConfig(tokens=3), tokens=tokens)


# Dictionaries whose scores are known


def made(world: World, folder: Path, layer: int, site: str, **tensors: Tensor) -> Run:
    """A finished run of given weights: a ReLU dictionary of 2 d latents, x+ and x- of every dimension, if not said."""
    store = world.store(layer, site)
    eye = torch.eye(store.d)
    weights = {
        "W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * store.d),
        "W_dec": torch.cat([eye, -eye], 0), "b_dec": torch.zeros(store.d),
    }  # fmt: skip
    config = TrainConfig(sae=parse({"arch": "l1", "d_sae": 2 * store.d}), steps=1, batch=64)
    run = open_run(config, Dataset.of(store), folder, "made", resume=False)
    described = {"architecture": "standard", "d_in": store.d, "d_sae": 2 * store.d}
    run.save_weights({**weights, **tensors}, described)
    return run


def judged(world: World, run: Run, config: EvalConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return evaluate(config, run, world.root, Silent(), **options).as_json()


@pytest.mark.parametrize(("layer", "site"), SITES)
def test_an_identity_costs_nothing(tmp_path: Path, gpt2: World, layer: int, site: str) -> None:
    """Exactly nothing, at every kind of site."""
    found = judged(gpt2, made(gpt2, tmp_path, layer, site))
    assert found["ce_spliced"] == found["ce_clean"] > 0
    assert found["details"]["downstream"]["degradation"] == {"value": 0, "low": 0, "high": 0}
    assert found["ce_recovered_zero"] == found["ce_recovered_mean"] == 1
    assert found["kl"] == 0 and found["fvu"] == 0 and found["explained_variance"] == 1
    assert found["l0"] == pytest.approx(gpt2.store(layer, site).d)  # of x+ and x-, one fires


@pytest.mark.parametrize(("layer", "site"), SITES)
def test_zeros_recover_nothing_of_zero_ablation(tmp_path: Path, gpt2: World, layer: int, site: str) -> None:
    d = gpt2.store(layer, site).d
    found = judged(gpt2, made(gpt2, tmp_path, layer, site, W_dec=torch.zeros(2 * d, d)))
    assert found["ce_spliced"] == found["ce_zero"] > found["ce_clean"]
    assert found["ce_recovered_zero"] == 0
    x = gpt2.store(layer, site, "validation")
    rows = x.rows(0, x.n_rows).double()
    assert found["fvu"] == pytest.approx(float(rows.square().sum() / (rows - rows.mean(0)).square().sum()))


@pytest.mark.parametrize(("layer", "site"), SITES)
def test_the_mean_recovers_nothing_of_mean_ablation(tmp_path: Path, gpt2: World, layer: int, site: str) -> None:
    """The mean of the training rows, not of the rows it is judged on."""
    store = gpt2.store(layer, site)
    mean = store.rows(0, store.n_rows).double().mean(0).float()
    run = made(gpt2, tmp_path, layer, site, W_dec=torch.zeros(2 * store.d, store.d), b_dec=mean)
    found = judged(gpt2, run)
    assert found["ce_spliced"] == found["ce_mean"] > found["ce_clean"]
    assert found["ce_recovered_mean"] == 0
    assert 1 < found["fvu"] < 1.2
    fewer = judged(gpt2, run, EvalConfig(mean_rows=64))
    assert fewer["ce_mean"] != found["ce_mean"] and fewer["ce_spliced"] == found["ce_spliced"]


def test_a_dictionary_that_never_fires(tmp_path: Path, gpt2: World) -> None:
    run = made(gpt2, tmp_path, 0, "resid_post", b_enc=torch.full((D_SAE,), -1e6))
    found = judged(gpt2, run)
    assert (found["l0"], found["dead_fraction"]) == (0, 1)
    json.dumps(found, allow_nan=False)


# A trained one, counted again


@pytest.fixture(scope="module")
def run(gpt2: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = gpt2.store(0, "resid_post")
    sae = parse({"arch": "topk", "d_sae": D_LATENTS, "k": 5})
    config = TrainConfig(sae=sae, steps=60, batch=64, lr=1e-2)
    run = open_run(config, Dataset.of(store), tmp_path_factory.mktemp("runs"), "trained", resume=False)
    train([run], Dataset.of(store), Silent(), device="cpu")
    return run


@pytest.mark.parametrize(("rows", "dead_rows"), [("all", 0), ("all", 64), (100, 10**9), (10**9, 64)])
def test_rows_are_judged_as_brute_force_does(gpt2: World, run: Run, rows: Any, dead_rows: int) -> None:
    found = judged(gpt2, run, EvalConfig(rows=rows, dead_rows=dead_rows, batch_tokens=96), replace_larger=True)
    held_out, training = gpt2.store(0, "resid_post", "validation"), gpt2.store(0, "resid_post")
    sae = trained.load_run(run)
    x = held_out.rows(0, held_out.n_rows if rows == "all" else min(rows, held_out.n_rows))
    searched = training.rows(0, min(dead_rows, training.n_rows))
    latents, x_hat = sae.encode(x).dense(), sae(x).double()
    fvu = ((x - x_hat).square().sum() / (x.double() - x.double().mean(0)).square().sum()).item()
    fires = (latents != 0).any(0)
    if len(searched):
        fires |= (sae.encode(searched).dense() != 0).any(0)
    assert found["rows"] == len(x)
    assert found["fvu"] == pytest.approx(fvu, rel=1e-6) and found["explained_variance"] == 1 - found["fvu"]
    assert found["l0"] == pytest.approx((latents != 0).sum(1).double().mean().item(), rel=1e-12)
    assert found["dead_fraction"] == pytest.approx((~fires).double().mean().item(), abs=1e-12)
    assert 0 < found["dead_fraction"] < 1
    assert found["details"]["dead_rows"] == len(x) + len(searched)
    written = safetensors.torch.load_file(run.path / LATENTS)
    torch.testing.assert_close(written["density"].double(), (latents != 0).double().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(written["fired"], fires)


def test_the_results_are_what_was_promised(gpt2: World, run: Run) -> None:
    found = judged(gpt2, run)
    assert found.keys() == PROMISED
    assert run.read_json(EVALUATION) == found
    assert found["rows"] == len(row_places(gpt2.held_out, gpt2.lengths)) and found["tokens"] == len(counted(gpt2))
    assert all(isinstance(found[name], float | int) for name in PROMISED - OF_CODES - {"details"})
    assert found["details"].keys() == {
        "dead_rows", "dead_by_definition", "reconstruction", "explained_variance_by_feature", "sparsity", "code_rate",
        "by_position", "by_frequency", "downstream", "held_out",
    }  # fmt: skip
    down = found["details"]["downstream"]
    assert down.keys() == set(DownstreamScores.__dataclass_fields__)
    assert down["ce_clean"]["low"] <= found["ce_clean"] <= down["ce_clean"]["high"]
    assert 0 < found["ce_recovered_mean"] < 1 and found["ce_clean"] < found["ce_spliced"] < found["ce_mean"]
    assert judged(gpt2, run) == found


def entropy(numbers: np.ndarray) -> float:
    shares = np.unique(numbers, return_counts=True)[1] / len(numbers)
    return float(-(shares * np.log2(shares)).sum())


def twin(world: World, run: Run) -> dict[str, Any]:
    """Every figure of a TopK run in NumPy's float64, one after the other, from the definitions and the files alone."""
    weights, _ = run.load_weights()
    W, b, V, c = (weights[name].double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    k, m, d = run.settings["sae"]["k"], len(b), len(c)

    def encode(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), m))
        for row, pre in enumerate((rows - c) @ W + b):
            top = np.argsort(-pre, kind="stable")[:k]
            found[row, top] = np.maximum(pre[top], 0)
        return found

    store, training = world.store(0, "resid_post", "validation"), world.store(0, "resid_post")
    x = store.rows(0, store.n_rows).double().numpy()
    f = encode(x)
    y = f @ V + c
    searched = np.concatenate([f, encode(training.rows(0, CONFIG.dead_rows).double().numpy())])
    error, spread = (x - y) ** 2, (x - x.mean(0)) ** 2
    norm, its = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    rates = (f != 0).mean(0)
    living = np.sort(rates[rates > 0])
    l1, l2 = np.abs(f).sum(1), np.sqrt((f**2).sum(1))
    unit = V / np.linalg.norm(V, axis=1)[:, None]
    cosines = unit @ unit.T
    others = cosines[~np.eye(m, dtype=bool)].reshape(m, m - 1)
    encoder = W / np.linalg.norm(W, axis=0)
    relative = np.sort(error.sum(1) / norm**2)
    found: dict[str, Any] = {
        "fvu": error.sum() / spread.sum(), "explained_variance": 1 - error.sum() / spread.sum(),
        "explained_variance_features": np.mean(1 - error.sum(0) / spread.sum(0)),
        "cosine": np.mean((x * y).sum(1) / norm / its), "l2_ratio": np.mean(its / norm),
        "relative_bias": (its**2).sum() / (x * y).sum(), "normalised_mse": relative.mean(), "mse": error.mean(),
        "rows": len(x), "row_error": relative[(len(relative) - 1) // 2],
        "l0": (f != 0).sum(1).mean(), "sparsity": (f == 0).mean(), "l1": l1.mean(),
        "l0_relative": (f > 0.01 * f.max(1, keepdims=True)).sum(1).mean(),
        "hoyer": np.mean((np.sqrt(m) - l1 / l2) / (np.sqrt(m) - 1)), "dense_share": (rates > 0.1).mean(),
        "rate_q25": np.quantile(living, 0.25), "rate_median": np.median(living), "rate_q75": np.quantile(living, 0.75),
        "dead_fraction": (searched == 0).all(0).mean(), "dead_rows": len(searched),
        "orthogonality": np.abs(others).mean(), "jl": np.sqrt(d) / m**2 * np.arctanh(np.abs(others)).sum(),
        "largest_cosine": others.max(), "mean_largest_cosine": others.max(1).mean(),
        "orthogonality_chance": np.sqrt(2 / (np.pi * d)), "welch_bound": np.sqrt((m - d) / (d * (m - 1))),
        "encoder_decoder_cosine": np.mean((encoder.T * unit).sum(1)),
        "active_parameters": (f != 0).sum(1).mean() * 2 * d,
    }  # fmt: skip
    deviations = f.std(0)
    for share in 2.0 ** -np.arange(-1.0, 11.0):
        step = np.where(deviations > 0, deviations * share, 1)
        if ((np.round(f / step) * step @ V + c - x) ** 2).sum() <= 1.05 * error.sum():
            found["bits"] = sum(entropy(column) for column in np.round(f / step).T)
            break
    mean = training.rows(0, training.n_rows).double().mean(0).float()
    sae = trained.load_run(run)
    passes = {"clean": None, "sae": sae, "zero": torch.zeros_like, "mean": lambda rows: mean.expand_as(rows)}
    chances = {name: plain_logits(world, 0, "resid_post", new).numpy() for name, new in passes.items()}
    contexts, places = (np.array(each) for each in zip(*counted(world), strict=True))
    told = world.held_out[contexts, places + 1]
    by = {name: -each[contexts, places, told] for name, each in chances.items()}
    clean = chances["clean"][contexts, places]
    kl = {n: (np.exp(clean) * (clean - each[contexts, places])).sum(1) for n, each in chances.items()}
    ce = {name: each.mean() for name, each in by.items()}
    found |= {
        "ce_clean": ce["clean"], "ce_spliced": ce["sae"], "ce_degradation": ce["sae"] - ce["clean"],
        "ce_zero": ce["zero"], "ce_mean": ce["mean"], "kl": kl["sae"].mean(), "tokens": len(places),
        "ce_recovered_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl_score": 1 - kl["sae"].mean() / kl["zero"].mean(),
    }  # fmt: skip
    at = store.positions(0, store.n_rows)
    real = np.arange(CONTEXT) < world.lengths[:, None]
    shares = np.bincount(world.held_out[real], minlength=VOCAB) / real.sum()
    kinds = {
        "by_position": (at % CONTEXT, places, [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]),
        "by_frequency": (
            shares[world.held_out.ravel()[at]], shares[world.held_out[contexts, places]],
            [(0.01, 1), (1e-3, 0.01 - 1e-9), (1e-4, 1e-3 - 1e-9)],
        ),
    }  # fmt: skip
    for kind, (of_rows, of_tokens, buckets) in kinds.items():
        found[kind] = []
        for low, high in buckets:
            here, there = (of_rows >= low) & (of_rows <= high), (of_tokens >= low) & (of_tokens <= high)
            if here.any():
                costs = {name: by[name][there].mean() for name in by}
                found[kind].append({
                    "rows": here.sum(), "fvu": error[here].sum() / spread[here].sum(),
                    "l0": (f[here] != 0).sum(1).mean(),
                    "tokens": there.sum(), "ce_clean": costs["clean"], "ce_degradation": costs["sae"] - costs["clean"],
                    "kl": kl["sae"][there].mean(),
                    "ce_recovered_zero": (costs["zero"] - costs["sae"]) / (costs["zero"] - costs["clean"]),
                })  # fmt: skip
    return found


def test_every_figure_is_that_of_a_slow_twin(gpt2: World, run: Run) -> None:
    """Within 1e-4 of a plain float64 computation, relative to what is larger than 1."""
    found, expected = judged(gpt2, run), twin(gpt2, run)
    apart = {}
    for key in PROMISED - OF_CODES - {"details", "mean_largest_cosine_chance"}:
        apart[key] = abs(found[key] - expected[key]) / max(1, abs(expected[key]))
    for kind in ("by_position", "by_frequency"):
        assert len(found["details"][kind]) == len(expected[kind]) > 1
        for line, its in zip(found["details"][kind], expected[kind], strict=True):
            assert {*its} == {*line} - {"from", "to", "below"}
            for key, value in its.items():
                apart[f"{kind} {key}"] = max(apart.get(f"{kind} {key}", 0), abs(line[key] - value) / max(1, abs(value)))
    assert {key: value for key, value in apart.items() if not value < 1e-4} == {}
    by_position = found["details"]["by_position"]
    assert sum(line["rows"] for line in by_position) == found["rows"]
    assert sum(line["tokens"] for line in by_position) == found["tokens"]
    unit = torch.nn.functional.normalize(trained.load_run(run).W_dec, dim=1)
    random = torch.nn.functional.normalize(torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(5)), dim=1)
    assert found["mean_largest_cosine_chance"] == pytest.approx(
        (random[:2000] @ random[2000 : 2000 + len(unit)].T).amax(1).mean().item(), abs=0.05
    )


def test_dead_by_each_definition_over_its_window(gpt2: World, run: Run) -> None:
    """In the order in which rows are read, which the loader's seed decides."""
    config = EvalConfig(dead_rows=400, batch_tokens=32)
    told = judged(gpt2, run, config, replace_larger=True)["details"]["dead_by_definition"]
    training, sae = Dataset.of(gpt2.store(0, "resid_post")), trained.load_run(run)
    held_out = training.held_out()
    fires = []
    for dataset, rows in ((held_out, held_out.n_rows), (training, 400)):
        with dataset.first(rows).batches(32, epochs=1) as loader:
            fires += [sae.encode(part.x).dense() != 0 for part in loader]
    rows, upto = torch.cat(fires), [len(one) for one in fires]
    of_held_out = (~rows[: held_out.n_rows].any(0)).sum().item()
    assert told["no held-out row"] == {
        "rows": held_out.n_rows,
        "latents": of_held_out,
        "share": of_held_out / D_LATENTS,
    }
    assert told["no row"]["latents"] == (~rows.any(0)).sum() and told["no row"]["rows"] == len(rows)
    assert told["no row of 5 batches"]["rows"] == sum(upto[:5])
    assert told["no row of 5 batches"]["latents"] == (~rows[: sum(upto[:5])].any(0)).sum() > of_held_out
    assert told["no row of 400 batches"] is None and told["no row of 10,000,000"] is None
    assert told["rate below 1e-06"] is None  # one firing would be more
    assert told["rate above 0.1"]["latents"] == (rows.double().mean(0) > 0.1).sum()


# Several runs at once


class Counting(Silent):
    """Counts what the passes go over."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.totals[title] = self.totals.get(title, 0) + (total or 0)


@pytest.fixture(scope="module")
def several(gpt2: World, run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs of two sites, one of them read at another site than it writes, one without its massive rows."""
    folder = tmp_path_factory.mktemp("several")
    first = made(gpt2, folder / "made", 1, "mlp_out", W_dec=0.5 * torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
    config = TrainConfig(sae=parse({"arch": "topk", "d_sae": 32, "k": 3}), steps=10, batch=64)
    pair = Dataset.of(gpt2.store(0, "resid_post"), gpt2.store(1, "mlp_out"))
    transcoder = open_run(config, pair, folder, "transcoder", resume=False)
    train([transcoder], pair, Silent(), device="cpu")
    return [run, first, transcoder, left_out(gpt2, folder / "left_out", 1.1, b_dec=torch.ones(WIDTH))]


def test_several_runs_are_judged_as_each_by_itself(gpt2: World, several: list[Run], monkeypatch: Any) -> None:
    """To the bit, in their folders too, with one clean pass for all and one pass over the rows of each dataset."""
    alone = [judged(gpt2, one, replace_larger=True) for one in several]
    files = [[(one.path / name).read_bytes() for name in (EVALUATION, LATENTS)] for one in several]
    for one in several:
        shutil.rmtree(one.path / "eval")
    passes = []
    compare = LanguageModel.compare
    monkeypatch.setattr(LanguageModel, "compare", lambda self, *given: passes.append(given) or compare(self, *given))
    progress = Counting()
    found = evaluate_all(CONFIG, several, gpt2.root, progress)
    assert [one.error for one in found] == [None] * len(several)
    assert [one.evaluation.as_json() for one in found if one.evaluation] == alone
    assert [[(one.path / name).read_bytes() for name in (EVALUATION, LATENTS)] for one in several] == files
    assert progress.totals["eval cross-entropy"] == gpt2.held_out.size
    assert len(passes) == len(gpt2.held_out) / 5
    # three sites of all rows and one of those kept, each with zeros and a mean; `run` and `left_out` share the first
    assert len(passes[0][1]) == 4 * 2 + len(several) + 1


def test_a_run_that_fails_leaves_the_others(gpt2: World, several: list[Run], tmp_path: Path) -> None:
    """Before, in a pass over rows and in one of the model; it is named, and its evaluation of before stays."""
    huge = made(gpt2, tmp_path / "huge", 0, "resid_post", W_dec=torch.full((D_SAE, WIDTH), 3e38))
    config = TrainConfig(sae=parse({"arch": "topk", "d_sae": 64, "k": 5}), steps=60, batch=64)
    unfinished = open_run(config, Dataset.of(gpt2.store(0, "resid_post")), tmp_path, "unfinished", resume=False)
    damaged = Run(shutil.copytree(several[0].path, tmp_path / "damaged"))
    weights = damaged.path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9] + b"123456789")
    runs = [unfinished, several[0], damaged, huge, several[1]]
    expected = [judged(gpt2, one) for one in several[:2]]
    found = evaluate_all(CONFIG, runs, gpt2.root, Silent())
    assert [one.error is None for one in found] == [False, True, False, False, True]
    assert [one.evaluation.as_json() for one in found if one.evaluation] == expected
    says = [str(one.error) for one in found if one.error]
    assert "has not finished" in says[0] and "damaged" in says[1] and "is not a number" in says[2], says
    with pytest.raises(DamagedStore, match=r"^3 of 5 runs could not be judged: unfinished: .*; damaged: .*; made: "):
        expect_evaluated(found)


def test_without_cross_entropy_no_model_is_loaded(gpt2: World, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """What rows alone tell is the same; figures of before that were judged on tokens stay."""
    whole = judged(gpt2, run, replace_larger=True)
    monkeypatch.setattr(LanguageModel, "boot", None)
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    found = judged(gpt2, copy, cross_entropy=False)
    of_model = {"ce_clean", "ce_spliced", "ce_degradation", "ce_zero", "ce_mean", "ce_recovered_zero",
                "ce_recovered_mean", "kl", "kl_score", "tokens", "details"}  # fmt: skip
    assert {key: whole[key] for key in PROMISED - of_model} == {key: found[key] for key in found if key != "details"}
    assert copy.read_json(EVALUATION) == whole
    (copy.path / EVALUATION).unlink()
    assert judged(gpt2, copy, cross_entropy=False) == copy.read_json(EVALUATION) == found
    assert {*found["details"]["by_position"][0]} == {"from", "to", "rows", "fvu", "l0"}
    for given in ({"model": "there"}, {"language_model": SimpleNamespace(name="there")}):
        with pytest.raises(SaeError, match=r"^model = there: none is spliced into with `cross_entropy = False`"):
            judged(gpt2, copy, cross_entropy=False, **given)


def test_judging_leaves_the_run_and_the_cache_as_they_are(gpt2: World, run: Run) -> None:
    def everything() -> dict[Path, bytes]:
        folders = (run.path, gpt2.root)
        return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file() and p.parent.name != "eval"}

    before = everything()
    judged(gpt2, run)
    assert everything() == before


# Refusals


def test_a_model_of_other_weights_is_refused(gpt2: World, run: Run, tmp_path: Path) -> None:
    other = save_model("gpt2", tmp_path / "gpt2", seed=8)
    with pytest.raises(
        SaeError, match=r"^model = .*gpt2: its weights differ from those .* was harvested with"
    ) as caught:
        judged(gpt2, run, model=str(other))
    assert "\n" not in str(caught.value)
    moved = shutil.copytree(gpt2.model, tmp_path / "moved")
    assert judged(gpt2, run, model=str(moved)) == judged(gpt2, run)
    with pytest.raises(NotFound, match="no such folder"):
        judged(gpt2, run, model=str(tmp_path / "nowhere" / "at" / "all"))


def test_a_strangers_hint_loads_nothing(gpt2: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint leads to a folder of this machine, and what is there is compared before any of it is loaded."""
    world = without(gpt2, tmp_path / "cache")
    store = catalogue.find(world.root, ActivationStore, str(world.root / "activations" / run.seen.key))
    other = save_model("gpt2", tmp_path / "gpt2", seed=8)
    loaded = []
    monkeypatch.setattr(LanguageModel, "boot", lambda name, **_: loaded.append(name))
    for hint, says in (
        (str(other), r"^model = .*gpt2: its weights differ from those"),
        ("owner/model", r"hints\.json: names the model owner/model; where that is right, repeat with `model`"),
        ("https://example.org/model", r"hints\.json: names the model https:"),
        ("s3://bucket/model", r"hints\.json: names the model s3:"),
        ("random:/etc", r"hints\.json: names the model random:/etc"),
        ("../gpt2", r"hints\.json: names the model \.\./gpt2"),
        ("/dev/null", r"hints\.json: the model is said to be at /dev/null, which is not a folder; say `model`"),
    ):
        write_note(store.path / HINTS, {"model": hint})
        with pytest.raises(SaeError, match=says):
            evaluate(EvalConfig(), run, world.root, Silent())
    assert loaded == []


def without(world: World, root: Path, *patterns: str) -> World:
    """A copy of a world's cache that lacks some folders."""
    shutil.copytree(world.root, root)
    for pattern in patterns:
        for folder in root.glob(pattern):
            shutil.rmtree(folder)
    return World(root, world.model, world.training, world.held_out, world.lengths)


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("activations/*-validation-*", r"no held-out rows beside it; tokenize with a validation share, then harvest"),
        ("tokens/*-validation-*", r"the validation tokens of .* are gone; run `tokenize\(\)` again"),
        ("activations/*resid_post*", r"trained was trained on it, but it is not in .*; say `activations`"),
    ],
)
def test_what_is_missing_is_named(gpt2: World, run: Run, tmp_path: Path, pattern: str, match: str) -> None:
    before = (run.path / EVALUATION).read_bytes() if (run.path / EVALUATION).exists() else None
    with pytest.raises(NotFound, match=match) as caught:
        judged(without(gpt2, tmp_path / "cache", pattern), run)
    assert "\n" not in str(caught.value)
    assert ((run.path / EVALUATION).read_bytes() if (run.path / EVALUATION).exists() else None) == before


def test_a_run_that_has_not_finished(gpt2: World, tmp_path: Path) -> None:
    config = TrainConfig(sae=parse({"arch": "topk", "d_sae": 64, "k": 5}), steps=60, batch=64)
    unfinished = open_run(config, Dataset.of(gpt2.store(0, "resid_post")), tmp_path, "unfinished", resume=False)
    with pytest.raises(NotFound, match="training has not finished"):
        judged(gpt2, unfinished)


def test_other_rows_than_the_run_was_trained_on(gpt2: World, run: Run) -> None:
    """Of its width: what one asks for is what one gets. Of another: refused."""
    assert judged(gpt2, run, activations=gpt2.store(1, "mlp_out").key)["fvu"] != judged(gpt2, run)["fvu"]
    wide = gpt2.store(0, "mlp_post").key
    with pytest.raises(SaeError, match=rf"^activations = {wide}: its rows have {4 * WIDTH} values, trained reads 16"):
        judged(gpt2, run, activations=wide)


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"rows": 0}, {"tokens": "some"}, {"dead_rows": -1}, {"batch": 3}, {"mean_rows": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvalConfig(**wrong)
    assert VOCAB > BEGIN


# Rows that training left out


def left_out(world: World, folder: Path, multiple: float, **tensors: Tensor) -> Run:
    """A finished run that left out rows above so many medians of norms."""
    store = world.store(0, "resid_post")
    config = TrainConfig(sae=parse({"arch": "l1", "d_sae": 2 * store.d}), steps=1, batch=64, outliers=multiple)
    made(world, folder, 0, "resid_post", **tensors)
    weights, described = Run(folder / "made").load_weights()
    run = open_run(config, Dataset.of(store), folder, "left_out", resume=False)
    run.save_weights(weights, described)
    return run


def test_both_are_shown_where_training_left_rows_out(tmp_path: Path, gpt2: World) -> None:
    """All held-out rows as ever, and beside them those that would have been trained on, counted by hand."""
    d = gpt2.store(0, "resid_post").d
    shrink = {"W_dec": 0.5 * torch.cat([torch.eye(d), -torch.eye(d)])}
    run = left_out(gpt2, tmp_path, 1.1, **shrink)
    found = judged(gpt2, run)
    every = judged(gpt2, Run(tmp_path / "made"))
    kept = found.pop("kept")
    for name in PROMISED - OF_CODES - {"details"}:
        assert found[name] == pytest.approx(every[name], rel=1e-9), name
    assert "kept" not in every and run.read_json(EVALUATION)["kept"] == kept
    assert {*kept} == {*every, "largest_norm"} - DIRECTIONS
    held_out, training = gpt2.store(0, "resid_post", "validation"), gpt2.store(0, "resid_post")
    assert (kept["largest_norm"],) == run.seen.limits
    assert kept["largest_norm"] == pytest.approx(1.1 * float(np.median(training.norms(0, 16))), 0.2)
    rows = held_out.rows(0, held_out.n_rows)[held_out.norms(0, held_out.n_rows) <= kept["largest_norm"]].double()
    assert 0 < kept["rows"] == len(rows) < every["rows"] and kept["tokens"] < every["tokens"]
    spread = (rows - rows.mean(0)).square().sum()
    assert kept["fvu"] == pytest.approx(float((rows / 2).square().sum() / spread), rel=1e-6)
    searched = training.norms(0, CONFIG.dead_rows) <= kept["largest_norm"]
    assert kept["details"]["dead_rows"] == len(rows) + int(searched.sum())
    tensors = safetensors.torch.load_file(run.path / LATENTS)
    assert {*tensors} == {
        "density", "fired", "density_kept", "fired_kept", "largest_cosine", "nearest", "encoder_decoder_cosine",
    }  # fmt: skip
    assert float(tensors["density_kept"].sum()) == pytest.approx(kept["l0"], rel=1e-5)


def test_the_norm_is_found_for_a_run_of_before_it_was_recorded(tmp_path: Path, gpt2: World) -> None:
    run = left_out(gpt2, tmp_path, 1.1)
    expected = judged(gpt2, run)
    described = run.read_json("config.json")
    del described["activations"]["largest_norm"]
    run.write_json("config.json", described)
    assert judged(gpt2, Run(run.path)) == expected


def test_held_out_rows_that_are_all_left_out(tmp_path: Path, gpt2: World) -> None:
    run = left_out(gpt2, tmp_path, 1.1)
    described = run.read_json("config.json")
    described["activations"]["largest_norm"] = 1e-9
    run.write_json("config.json", described)
    with pytest.raises(SaeError, match=r"^rows = \d+: training would have left all of them out for their norm"):
        judged(gpt2, Run(run.path))


class Told(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> World:
    """A model whose residual stream is huge at position 1, as where attention rests."""
    root = tmp_path_factory.mktemp("sink")
    model = plain_model(save_model("gpt2", root / "gpt2"))
    with torch.no_grad():
        model.transformer.wpe.weight[1, [2, 5]] = torch.tensor([900.0, -700.0])
    model.save_pretrained(root / "gpt2")
    return make_world(root, root / "gpt2")


def test_massive_rows_are_told_of_and_judged_without_whatever_was_trained_on(tmp_path: Path, sink: World) -> None:
    """From the harvest on: what is said at each stage is what was planted, and FVU is given both ways."""
    store, held_out = sink.store(1, "resid_mid"), sink.store(1, "resid_mid", "validation")
    planted, judged_on = (int((one.positions(0, one.n_rows) % CONTEXT == 1).sum()) for one in (store, held_out))
    far = beyond_usual(store, store.n_rows)
    assert far is not None and far.massive and (far.rows, far.positions) == (planted, {1: planted})
    config = TrainConfig(sae=parse({"arch": "topk", "d_sae": 32, "k": 4}), steps=30, batch=64, lr=1e-2)
    found, told = {}, Told()
    for rule in ("auto", None):
        run = open_run(
            config.model_copy(update={"outliers": rule}), Dataset.of(store), tmp_path, str(rule), resume=False
        )
        train([run], Dataset.of(store), told, device="cpu")
        found[rule] = evaluate(CONFIG, run, sink.root, told).as_json()
    auto, every = found["auto"], found[None]
    limit = Run(tmp_path / "auto").seen.limits
    assert limit is not None and (auto["kept"]["largest_norm"],) == (every["kept"]["largest_norm"],) == limit
    assert Run(tmp_path / "None").seen.limits is None
    for one in found.values():
        assert one["rows"] == held_out.n_rows == one["kept"]["rows"] + judged_on
        said = one["details"]["far_rows"][held_out.key]
        assert (said["rows"], said["positions"]) == (judged_on, {"1": judged_on})
        assert said["massive"] and said["share"] > 0.9
        assert {"fvu", "row_error", "ce_spliced"} <= one["kept"].keys()
    assert every["fvu"] < 0.1 < 0.3 < every["kept"]["fvu"]  # all that was learned is the few rows
    assert auto["kept"]["fvu"] < 0.7 * every["kept"]["fvu"] and auto["kept"]["row_error"] < every["kept"]["row_error"]
    lines = [line for line in told.notes if "of the variance" in line]
    assert [line.rpartition("; ")[2] for line in lines if line.startswith(f"{store.key}: {planted} of ")] == [
        "they are left out", "they are trained on, `train.outliers = 5` leaves them out",
    ]  # fmt: skip
    assert sum(line.startswith(f"{held_out.key}: {judged_on} of ") for line in lines) == 2


# What is there already


def test_an_evaluation_on_less_leaves_one_on_more(tmp_path: Path, gpt2: World) -> None:
    """It is returned and said, not written; one on as much or more, or on request, is."""
    run = made(gpt2, tmp_path, 0, "resid_post")
    full, told = judged(gpt2, run), Told()

    def again(config: EvalConfig, **options: Any) -> tuple[dict[str, Any], dict[str, Any], bytes]:
        found = evaluate(config, run, gpt2.root, told, **options).as_json()
        return found, run.read_json(EVALUATION), (run.path / LATENTS).read_bytes()

    latents = (run.path / LATENTS).read_bytes()
    for less, unit in (
        ({"tokens": 3 * CONTEXT}, "predictions"),
        ({"rows": 50}, "rows"),
        ({"dead_rows": 0}, "searched"),
    ):
        found, there, kept = again(CONFIG.model_copy(update=less))
        assert found != full and there == full and kept == latents
        assert unit in told.notes[-1] and told.notes[-1].endswith("; `replace` puts this one in its place")
    assert again(CONFIG)[1] == full and len(told.notes) == 3
    found, there, _ = again(CONFIG.model_copy(update={"rows": 50}), replace_larger=True)
    assert found == there != full and there["rows"] == 50
    assert again(CONFIG)[1] == full and len(told.notes) == 3
    there["details"]["held_out"] = "another-store"
    run.write_json(EVALUATION, {**there, "rows": 1, "tokens": 1})
    again(CONFIG)
    assert "it is of another-store, this one of" in told.notes[-1]
    run.write_json(EVALUATION, {})  # nothing to lose
    assert again(CONFIG)[1] == full


def test_it_looks_first_whether_it_can_write(
    tmp_path: Path, gpt2: World, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    run = made(gpt2, tmp_path, 0, "resid_post")
    (run.path / "eval").write_text("a file")
    monkeypatch.setattr(LanguageModel, "boot", lambda *_, **__: pytest.fail("it went to work"))
    with pytest.raises(SaeError, match=r"eval: cannot write here"):
        judged(gpt2, run)


def test_sites_of_two_models_are_not_spliced() -> None:
    """Rows of two models over the same tokens align, and may be trained on; there is no model to splice into."""
    one, same, other = (
        cast(ActivationStore, SimpleNamespace(key=key, recipe={"model": {"weights": weights}}))
        for key, weights in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    expect_one_model([one, same])
    with pytest.raises(SaeError, match=r"^c: is of another language model than a"):
        expect_one_model([one, same, other])


# Several stores


class Layered(LayerByLayer):
    """A cross-layer transcoder of sorts, of two layers as wide as each other."""

    d_in = d_out = 2 * WIDTH
    widths_in = widths_out = (WIDTH, WIDTH)

    def constant(self, rows: int) -> Tensor:
        return torch.full((rows, 2 * WIDTH), 0.01)

    def written_by(self, layer: int, x: Tensor) -> tuple[int, Tensor]:
        return (WIDTH, 0.07 * x.abs()) if layer else (0, torch.cat([0.05 * x, -0.03 * x.abs()], 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.constant(len(x))
        for layer, part in enumerate(x.split(WIDTH, 1)):
            place, more = self.written_by(layer, part)
            out[:, place:] += more
        return out


@torch.no_grad()
def chances_with(world: World, mlps: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """Log-probabilities of the plain model where an MLP's rows are a function of the stream that it reads."""
    model = plain_model(world.model)
    rows = torch.zeros(world.held_out.shape, dtype=torch.bool)
    rows.view(-1)[row_places(world.held_out, world.lengths)] = True
    read: dict[int, Tensor] = {}
    for layer, new in mlps.items():
        block = blocks(model)[layer]
        block.ln_2.register_forward_pre_hook(lambda _, args, layer=layer: read.update({layer: args[0]}))

        def replace(_module: Any, _args: Any, out: Tensor, layer: int = layer, new: Any = new) -> Tensor:
            out = out.clone()
            out[rows] = new(read[layer][rows])
            return out

        block.mlp.register_forward_hook(replace)
    return model(torch.from_numpy(world.held_out)).logits.double().log_softmax(-1)


def test_several_stores_are_spliced_at_once_and_alone_and_layers_as_they_come(gpt2: World) -> None:
    """What a layer-by-layer predictor reads in the pass that it changes; any other, in the model as it is."""
    reads, writes = ([gpt2.store(layer, site, "validation") for layer in (0, 1)] for site in ("resid_mid", "mlp_out"))
    dataset, mean = Dataset.of(tuple(reads), tuple(writes)), torch.linspace(-1, 1, 2 * WIDTH)
    layered = Layered()
    places = counted(gpt2)

    def ce(chances: Tensor) -> float:
        return float(np.mean([-chances[c, p, gpt2.held_out[c, p + 1]] for c, p in places]))

    def found(sae: Any, dataset: Dataset = dataset) -> dict[str, DownstreamScores]:
        metric = Downstream()
        spliced_into(gpt2, sae, dataset, mean, metric)
        assert {*metric.details()} == {"downstream", "downstream_alone"}
        return metric.scores()

    first = {}  # what the first layer wrote for the second one in the same pass

    def from_first(x: Tensor) -> Tensor:
        _, both = layered.written_by(0, x)
        first["later"] = both[:, WIDTH:]
        return both[:, :WIDTH] + 0.01

    as_they_come = {0: from_first, 1: lambda x: first["later"] + layered.written_by(1, x)[1] + 0.01}
    values = plain_values(gpt2.model, gpt2.held_out)
    rows = row_places(gpt2.held_out, gpt2.lengths)
    clean = torch.cat([values[layer, "resid_mid"][rows] for layer in (0, 1)], 1)
    fixed = layered(clean).split(WIDTH, 1)
    constants = (torch.zeros(WIDTH),) * 2, mean.split(WIDTH)
    zero, at_mean = ({0: lambda _, m=m: m[0], 1: lambda _, m=m: m[1]} for m in constants)
    scored = found(layered)
    for name, mlps in (
        ("sae", as_they_come), ("zero", zero), ("mean", at_mean),
        ("sae at 0.mlp_out", {0: lambda _: fixed[0]}), ("sae at 1.mlp_out", {1: lambda _: fixed[1]}),
    ):  # fmt: skip
        assert scored[name].ce.value == pytest.approx(ce(chances_with(gpt2, mlps)), abs=2e-6), name
    assert scored["sae"].ce_zero is not None and scored["sae at 0.mlp_out"].ce_zero is None
    read_before = found(layered.forward)
    assert read_before["sae"].ce.value == pytest.approx(
        ce(chances_with(gpt2, {0: lambda _: fixed[0], 1: lambda _: fixed[1]})), abs=2e-6
    )
    assert read_before["sae"].ce.value != scored["sae"].ce.value
    with pytest.raises(SaeError, match=r"0\.mlp_out is computed after 0\.resid_mid"):
        found(layered, Dataset.of(tuple(writes), tuple(reads)))


def test_a_run_on_several_stores_is_judged_store_by_store(gpt2: World, tmp_path: Path) -> None:
    dataset = Dataset.of(tuple(gpt2.store(layer, "resid_post") for layer in (0, 1)))
    config = TrainConfig(sae=parse({"arch": "crosscoder", "d_sae": D_SAE, "k": 4}), batch=64, steps=30, lr=1e-2)
    run = open_run(config, dataset, tmp_path, "both", resume=False)
    train([run], dataset, Silent(), device="cpu")
    found = judged(gpt2, run)
    sae = trained.load_run(run)
    held_out = dataset.held_out()
    rows = held_out.rows(0, held_out.n_rows)
    with torch.no_grad():
        wrong, right = (one.split(WIDTH, 1) for one in (rows.y - sae(rows.x), rows.y - rows.y.mean(0)))
    fvus = [(a.square().sum() / b.square().sum()).item() for a, b in zip(wrong, right, strict=True)]
    stores = found["details"]["stores"]
    assert [*stores] == ["0.resid_post", "1.resid_post"]
    assert [one["fvu"] for one in stores.values()] == pytest.approx(fvus, rel=1e-4)
    assert found["fvu_stores"] == pytest.approx(sum(fvus) / 2, rel=1e-4)
    living = int((sae.encode(rows.x).fired() > 0).sum())
    assert all(sum(one["decoder_shares"]) == living for one in stores.values())
    norms = torch.stack([part.norm(dim=1) for part in sae.W_dec.split(WIDTH, 1)], 1)
    lengths = torch.stack([part.square().sum(1).mean().sqrt() for part in rows.y.split(WIDTH, 1)])
    kept = run.load_latents()
    assert kept is not None
    torch.testing.assert_close(kept["decoder_norms"], norms / lengths, rtol=1e-4, atol=1e-6)
    assert {*found["details"]["downstream_alone"]} == {"0.resid_post", "1.resid_post"}
    page = report(run, gpt2.root, Silent(), device="cpu").read_text()
    assert page.count('aria-label="Latents by share of decoder norm at') == 2 and "0.resid_post + 1.resid_post" in page
    features = found_features(run)
    assert features is not None
    latent = features.features[0]  # its largest firing is that of a row of both stores
    with torch.no_grad():
        values = sae.encode(dataset.rows(0, dataset.n_rows).x).dense()[:, latent.latent]
    assert latent.top[0].value == pytest.approx(values.max().item(), rel=1e-4)


@pytest.mark.parametrize("limited", [False, True])
def test_passes_ask_a_device_that_runs_ahead_for_nothing(
    gpt2: World, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    """Not for a number, nor for a shape that follows from one; what is found is asked for once they are over."""
    monkeypatch.setattr(placement, "HOSTS", set())
    stores = [gpt2.store(0, "resid_post", split) for split in ("train", "validation")]
    limits = (float(np.quantile(stores[1].norms(0, stores[1].n_rows), 0.7)),) if limited else None
    model, tokens = gpt2.booted(), gpt2.tokens()
    assert model.width(Point(0, "resid_post")) == WIDTH  # once, it is tried out whether it keeps its promises
    training, held_out = (Dataset.of(one).kept_up_to(limits) for one in stores)
    sae = create(parse({"arch": "topk", "k": 3, "d_sae": D_SAE}), WIDTH).eval()
    one = Judged(subject=Subject(sae), training=training, held_out=held_out, tokens=tokens)
    one.begin(model)
    places, found = TokenPlaces(tokens), []
    for side, most in zip(one.sides, (None, limits), strict=False):
        site = Site(held_out.kept_up_to(most), torch.ones(WIDTH))
        found.append(Splice(sae=sae, site=site, metrics=side))
    passes: list[Callable[[], None]] = [
        lambda: judge_rows([one], held_out.n_rows, 64, Silent(), places),
        lambda: search_rows([one], training.n_rows, 64, Silent()),
        lambda: judge_tokens(found, model, tokens, CONFIG, Silent(), places),
    ]
    asked = sum((watched(each).asked for each in passes), Counter())
    ends = asked.pop("token_passes.py _local_scalar_dense")
    assert ends == 2 * len(found)  # whether it was a number, and whether anything counted
    assert asked.pop("masking_utils.py _local_scalar_dense")  # transformers does, once a pass
    assert not {*asked} - {*OF_THE_HOST}, asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_card_finds_what_the_host_finds(gpt2: World, run: Run, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        shutil.copytree(run.path, tmp_path / device)
        found.append(judged(gpt2, Run(tmp_path / device), device=device))
    here, there = ({name: value for name, value in one.items() if isinstance(value, float | int)} for one in found)
    assert here.keys() == there.keys()
    for name, value in here.items():  # bits are of the largest step that costs little, so they may be of the next one
        assert there[name] == pytest.approx(value, rel=0.2 if name == "bits" else 1e-3, abs=1e-4), name


OF_THE_HOST = (
    "codecs.py lift_fresh", "places.py lift_fresh", "dataset.py lift_fresh", "token_passes.py lift_fresh",  # of numpy
    "splicing.py nonzero", "model.py _local_scalar_dense", "activations.py _local_scalar_dense",
)  # fmt: skip
"""What asks for numbers that are on the CPU, whatever computes."""
