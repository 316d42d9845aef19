"""Several aligned stores as one side of a dataset: rows side by side, a scale each, and all that goes with a run."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import done, sae
from support.small_stores import activation_recipe, extend, shrunk, token_recipe
from torch import Tensor
from torch.nn import functional as F

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.formats import trained, write
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import SAE, create, parse
from sae.pipeline.train.stage import TrainConfig, open_run, run_name, train

WIDTHS, SIZES, ROWS = (6, 9, 5), (1.0, 20.0, 0.1), 512
COST = ("seconds", "seconds_per_step", "megabytes")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with shrunk():
        yield
    torch.set_num_threads(threads)


def written(root: Path, values: Tensor, layer: int, **changes: Any) -> ActivationStore:
    recipe = activation_recipe(values.shape[1], "float32", site="resid_post") | {"layer": layer} | changes
    with ActivationWriter(root, f"planted-{layer}.resid_post", recipe) as writer:
        extend(writer, values, ended=True)
        return writer.store


def layers_of_one_token(n: int = ROWS, seed: int = 0) -> list[Tensor]:
    """Rows [n, d] of each store, all made of the same sparse coefficients, at very different sizes."""
    random, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    chosen = torch.rand(n, 16, generator=random)
    coefficients = chosen * (chosen > 0.8)
    return [size * (coefficients @ torch.randn(16, d, generator=fixed)) for d, size in zip(WIDTHS, SIZES, strict=True)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, small: None) -> tuple[ActivationStore, ...]:
    root = tmp_path_factory.mktemp("cache")
    return tuple(written(root, rows, layer) for layer, rows in enumerate(layers_of_one_token()))


def settings(**changes: Any) -> TrainConfig:
    given = {"lr": 1e-2, "batch": 64, "steps": 20, "log_every": 4, "checkpoint_every": 100, "initial_rows": 256}
    return TrainConfig(**{"sae": parse({"arch": "topk", "k": 3, "d_sae": 24}), "decoder": None, **given, **changes})


def go(
    config: TrainConfig, dataset: Dataset, root: Path, *, progress: Silent | None = None, resume: bool = False
) -> Run:
    run = open_run(config, dataset, root, "it", resume=resume)
    train([run], dataset, progress or Silent(), device="cpu")
    return run


def outcome(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    metrics = [{name: value for name, value in line.items() if name not in COST} for line in run.metrics()]
    return run.load_weights()[0] | run.load_checkpoint()[0], metrics


def stopping(step: int) -> Silent:
    class Stopping(Silent):
        left = step

        def advance(self, n: int, **fields: object) -> None:
            self.left -= n
            if not self.left:
                signal.raise_signal(signal.SIGINT)

    return Stopping()


def test_rows_of_several_stores_lie_side_by_side_in_one_order(stores: tuple[ActivationStore, ...]) -> None:
    dataset = Dataset.of(stores[:2], stores[1:])
    assert (dataset.widths_in, dataset.d_in, dataset.widths_out, dataset.d_out) == ((6, 9), 15, (9, 5), 14)
    alone = {store.key: Dataset.of(store) for store in stores}
    with dataset.batches(50, seed=3, epochs=1) as both, dataset.batches(50, seed=3, epochs=1) as again:
        loaders = [alone[store.key].batches(50, seed=3, epochs=1) for store in stores]
        for batch, *each in zip(both, *loaders, strict=True):
            a, b, c = (one.x for one in each)
            assert torch.equal(batch.x, torch.cat([a, b], 1)) and torch.equal(batch.y, torch.cat([b, c], 1))
        for loader in loaders:
            loader.close()
        taken = next(iter(again))
        state = again.state_dict()
        following = next(iter(again))
    with dataset.batches(50, seed=3, epochs=1) as resumed:
        resumed.load_state_dict(state)
        found = next(iter(resumed))
    assert torch.equal(found.x, following.x) and torch.equal(found.y, following.y) and not torch.equal(found.x, taken.x)
    assert torch.equal(dataset.rows(5, 9).x, torch.cat([store.rows(5, 9) for store in stores[:2]], 1))
    assert torch.equal(dataset.read(5, 9), dataset.rows(5, 9).x)


def test_each_store_has_a_scale_of_its_own(stores: tuple[ActivationStore, ...]) -> None:
    dataset = Dataset.of(stores)
    rows = dataset.rows(0, ROWS)
    for scale, squares in (("rms", WIDTHS), ("unit", (1, 1, 1))):
        made = create(parse({"arch": "topk", "k": 3, "d_sae": 24, "input_scale": scale}), dataset.widths_in)
        made.initialise(rows.x)
        parts = (rows.x * made.scale).split(WIDTHS, dim=1)
        torch.testing.assert_close(
            torch.stack([part.square().sum(1).mean() for part in parts]), torch.tensor(squares).float()
        )
        assert made.scale.shape == (sum(WIDTHS),)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu", "l1"])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_a_folded_dictionary_is_the_same_function(stores: tuple[ActivationStore, ...], arch: str, norm: str) -> None:
    dataset = Dataset.of(stores[:2], stores[1:])
    more = {"k": 3} if "topk" in arch else {}
    made = create(
        parse({"arch": arch, "d_sae": 24, "decoder_norm": norm} | more), dataset.widths_in, dataset.widths_out
    )
    rows = dataset.rows(0, 64)
    made.initialise(rows.x, rows.y)
    with torch.no_grad():
        made.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])
        if made.W_skip is not None:
            made.W_skip.normal_()
        if arch == "batchtopk":
            made.threshold.fill_(0.3)
    made.eval()
    formula = made.formula()
    assert (formula.widths_in, formula.widths_out) == (dataset.widths_in, dataset.widths_out)
    again = type(made).from_formula(made.config, formula).eval()
    torch.testing.assert_close(again(rows.x), made(rows.x), rtol=1e-4, atol=1e-4)
    assert (again.scale == 1).all() and again.widths_out == (9, 5)


def test_a_run_on_several_stores_is_resumed_to_the_bit_and_opens_again(
    stores: tuple[ActivationStore, ...], tmp_path: Path
) -> None:
    dataset = Dataset.of(stores)
    whole = go(settings(), dataset, tmp_path / "whole")

    with pytest.raises(Interrupted, match="checkpoint at step 7"):
        go(settings(), dataset, tmp_path / "cut", progress=stopping(7))
    cut = go(settings(), dataset, tmp_path / "cut", resume=True)
    (tensors, metrics), (others, logged) = outcome(whole), outcome(cut)
    assert metrics == logged and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert [one.key for one in cut.seen.inputs] == [store.key for store in stores] and cut.seen.targets == ()
    loaded = trained.load_run(cut)
    assert isinstance(loaded, SAE) and loaded.widths_in == loaded.widths_out == WIDTHS
    assert loaded.metadata.beside == ("blocks.1.hook_resid_post",) * 2
    root = stores[0].path.parent.parent
    assert trained.dataset_of(cut, root).key == dataset.key
    with pytest.raises(SaeError, match="saelens cannot say this dictionary: it has none whose rows are of several"):
        write(loaded, loaded.metadata, tmp_path / "out")


def test_a_cross_layer_transcoder_is_resumed_to_the_bit_and_opens_again(
    stores: tuple[ActivationStore, ...], tmp_path: Path
) -> None:
    dataset = Dataset.of(stores[:2], stores[1:])
    config = settings(sae=parse({"arch": "clt", "k": 2, "d_sae": 12, "dead_after": 200}))
    whole = go(config, dataset, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(config, dataset, tmp_path / "cut", progress=stopping(7))
    cut = go(config, dataset, tmp_path / "cut", resume=True)
    (tensors, metrics), (others, logged) = outcome(whole), outcome(cut)
    assert metrics == logged and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert metrics[-1]["fvu"] < 0.95 * metrics[0]["fvu"] and 0 <= metrics[-1]["dead"] < 1
    found, rows = trained.load_latents(cut), dataset.rows(0, ROWS)
    error = (found(rows.x) - rows.y).square().sum() / (rows.y - rows.y.mean(0)).square().sum()
    assert error < 1.2 * metrics[-1]["fvu"] and found.metadata.beside_out == ("blocks.1.hook_resid_post",)
    with pytest.raises(SaeError, match="trained a clt, not a sparse dictionary"):
        trained.load_run(cut)
    with pytest.raises(SaeError, match=r"1\.resid_post is computed no earlier than 0\.resid_post"):
        open_run(config, Dataset.of(stores[1::-1], stores[1:]), tmp_path, "backwards", resume=False)


def test_a_target_of_each_layer_is_told_of_by_layer(stores: tuple[ActivationStore, ...], tmp_path: Path) -> None:
    told: list[str] = []

    class Notes(Silent):
        def note(self, line: str) -> None:
            told.append(line)

    sae = parse({"arch": "clt", "sparsity": "jumprelu", "d_sae": 12, "target_l0": 0.1})
    run = go(settings(sae=sae, steps=2), Dataset.of(stores[:2], stores[1:]), tmp_path, progress=Notes())
    (line,) = (line for line in told if "target_l0" in line)
    l0 = run.metrics()[-1]["l0"] / 2
    assert line.startswith(f"{run.name}: L0 is {l0:.4g} a layer at the end, not near train.sae.target_l0 = 0.1; train")


def test_names_of_runs_tell_stores_and_their_order_apart(stores: tuple[ActivationStore, ...]) -> None:
    a, b, c = stores
    datasets = [
        Dataset.of(a),
        Dataset.of((a, b)),
        Dataset.of((b, a)),
        Dataset.of((a, b), (b, c)),
        Dataset.of(a, (b, c)),
    ]
    names = [run_name(settings(), dataset) for dataset in datasets]
    assert len({*names}) == 5 and "0.resid_post+1.resid_post-to-1.resid_post+2.resid_post" in names[3]


def test_what_does_not_align_is_one_line_that_names_both(stores: tuple[ActivationStore, ...], tmp_path: Path) -> None:
    rows = layers_of_one_token()[2]
    other_rule = written(tmp_path / "a", rows, 2, rows={"skip_first": 2, "skip_begin": True})
    other_tokens = written(tmp_path / "b", rows, 2, tokens=activation_recipe(5, seed=9)["tokens"])
    fewer = written(tmp_path / "c", rows[:100], 2)
    for other, what in ((other_rule, "another rule"), (other_tokens, "other tokens"), (fewer, "has 100 rows")):
        with pytest.raises(SaeError, match=f"{other.path.name}.*{what}.*{stores[0].key}"):
            Dataset.of((stores[0], other))
    with pytest.raises(SaeError, match=f"{stores[0].key}: is named twice among"):
        Dataset.of((stores[0], stores[1], stores[0]))
    with pytest.raises(SaeError, match="input_scale: per_token is of rows of one store"):
        go(settings(sae=parse({"arch": "l1", "d_sae": 8, "input_scale": "per_token"})), Dataset.of(stores), tmp_path)


def test_the_command_line_lists_stores_with_commas(stores: tuple[ActivationStore, ...], tmp_path: Path) -> None:
    cache, runs = stores[0].path.parent.parent, tmp_path / "runs"
    said = f"train --cache {cache} --runs {runs} --device cpu --k 2 --d-sae 8 --batch 32 --steps 2"
    made = sae(f"{said} --input 0.resid_post,1.resid_post --target {stores[2].key} --name one --json")
    assert made.code == 0 and made.json["fvu"] > 0, made.err
    assert [one.key for one in Run(runs / "one").seen.stores] == [store.key for store in stores]
    for asked, line in (
        ("--input 0.resid_post,0.resid_post", "is there twice"),
        (f"--input 0.resid_post,{stores[0].key}", "is named twice among"),
        ("--input 0.resid_post,1.resid_post --target 0.resid_post,1.resid_post", "is what is read"),
        ("--input 0.resid_post,", "between two commas nothing stands"),
        ("--input 0.resid_post,7.resid_post", "no store of it beside"),
    ):
        answer = sae(f"{said} {asked} --name two")
        assert answer.code in (2, 3) and line in answer.complaint, answer.err
        assert not (runs / "two").exists()


def test_what_one_of_two_models_has_alone_is_found(tmp_path: Path) -> None:
    """By commands: two models' stores of the same tokens, a crosscoder, and where its latents have their decoders."""
    cache, runs, d, features = tmp_path / "cache", tmp_path / "runs", 10, 8
    tables = [F.normalize(torch.randn(features, d, generator=torch.Generator().manual_seed(i)), dim=1) for i in (1, 2)]
    tables[1][0] = 0  # the first model's alone
    keys = {}
    for split, n in (("train", 1024), ("validation", 256)):
        chosen = torch.rand(n, features, generator=torch.Generator().manual_seed(n))
        coefficients = (chosen > 0.8) * (0.5 + chosen)
        for name, table in zip("ab", tables, strict=True):
            model = {"model": {"model": name}, "tokens": token_recipe(split)}
            keys[name, split] = written(cache, coefficients @ table, 1, **model).key
    here = f"--cache {cache} --device cpu --runs {runs}"
    both = ",".join(keys[name, "train"] for name in "ab")
    done(f"train --arch crosscoder --input {both} --d-sae 8 --k 2 --batch 64 --steps 500 --lr 1e-2 --name diff {here}")
    judged = done(f"eval diff {here} --json")
    assert "of two language models, so the dictionary is spliced into neither" in judged.err
    stores = judged.json["details"]["stores"]
    assert [*stores] == both.split(",") and judged.json["fvu"] < 0.2
    shares = torch.tensor([one["decoder_shares"] for one in stores.values()])
    assert judged.json["exclusive_share"] == pytest.approx(1 / features)
    assert shares[0, 18:].sum() == 1 and shares[1, :2].sum() == 1 and shares[:, 6:14].sum() == 2 * (features - 1)
    written_out = sae(f"export diff --to saelens --runs {runs} --out {tmp_path / 'out'}").complaint
    assert "rows are of several stores" in written_out
