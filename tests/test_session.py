"""`sae.Session`: from text and from rows in memory to trained and judged dictionaries, in a few lines each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import small_stages
from torch import Tensor

import sae
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline import formats
from sae.pipeline.metrics.figures import compared
from sae.pipeline.saes import create
from sae.pipeline.studies.rates import Rates
from sae.runs import TrainedRun
from sae.session import Session
from sae.tables import Figures, Table

D, FEATURES = 8, 12


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_stages():
        yield


def planted(n: int, seed: int = 0) -> Tensor:
    """Rows [n, D] of two of some features each."""
    random = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(
        torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(9)), dim=1
    )
    which = torch.rand(n, FEATURES, generator=random).topk(2, dim=1).indices
    return 3 * (features[which] * (0.5 + torch.rand(n, 2, 1, generator=random))).sum(1) + 1


@pytest.fixture
def lab(tmp_path: Path) -> Session:
    return sae.Session(
        cache=str(tmp_path / "cache"), runs=tmp_path / "runs", device="cpu", offline=True, progress=False
    )


TOPK: dict[str, Any] = {"k": 2, "d_sae": 16}
SHORT: dict[str, Any] = {"steps": 40, "batch": 64, "lr": 3e-3, "log_every": 10}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, sae.Dataset]]:
    """A session with a harvest of the embedded model."""
    root = tmp_path_factory.mktemp("text")
    lab = sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)
    tokens = lab.tokenize(preset="tiny", tokens=6_000, validation_tokens=2_000, validation=0.3)
    assert isinstance(tokens, TokenStore) and tokens.split == "train"
    return lab, lab.harvest(preset="tiny", layer=1, site=["mlp_in", "mlp_out"], tokens=2_000, validation_tokens=500)


def test_rows_in_memory_are_trained_on_and_judged(lab: Session) -> None:
    x = planted(1000)
    run = lab.train(sae.TopK(**TOPK), x, **SHORT)
    assert isinstance(run, TrainedRun) and run.finished and run.path.parent == lab.runs
    coder = run.load()
    assert coder.d_in == D and not coder.training
    judged = lab.evaluate(run)
    assert judged["fvu"] == run.evaluation()["fvu"] < 0.5  # type: ignore[index]
    rows = lab.dataset(x)
    assert lab.evaluate(coder, rows.held_out())["fvu"] == pytest.approx(judged["fvu"], rel=1e-6)
    unseen = planted(500, seed=1)
    found = lab.evaluate(coder, unseen)
    error = (coder(unseen) - unseen).square().sum() / (unseen - unseen.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(error.item(), rel=1e-4) and found["rows"] == 500
    assert found["l0"] == pytest.approx(coder.encode(unseen).l0().double().mean().item())


def test_massive_rows_are_left_out_and_judged_apart(lab: Session) -> None:
    """By a run, and by a dictionary on rows of which nothing was said."""
    x = planted(1000, seed=7)
    x[::50, 1] += 300
    run = lab.train(sae.TopK(**TOPK), x, **SHORT)
    assert run.seen.limits is not None and run.settings["outliers"] == "auto"
    unseen = planted(500, seed=8)
    usual = lab.evaluate(run.load(), unseen)
    assert "kept" not in usual
    unseen = torch.cat([unseen, unseen[:5] + 300])
    found = lab.evaluate(run.load(), unseen)
    assert (found["rows"], found["kept"]["rows"]) == (505, 500) and found["kept"]["largest_norm"] < 200
    assert found["kept"]["fvu"] == pytest.approx(usual["fvu"], rel=1e-5)
    assert {"fvu", "kept_fvu", "row_error", "kept_row_error"} <= lab.compare([run])[0].keys()


def test_the_same_rows_and_settings_again_train_nothing(lab: Session) -> None:
    x = planted(500)
    first = lab.train(sae.TopK(**TOPK), x, **SHORT)
    weights = (first.path / "sae_weights.safetensors").stat().st_mtime_ns
    again = lab.train(sae.TopK(**TOPK), x.double().numpy(), **SHORT)
    assert again.path == first.path and (first.path / "sae_weights.safetensors").stat().st_mtime_ns == weights
    assert len(list((lab.cache / "activations").iterdir())) == 2  # with those held out
    other = lab.train(sae.TopK(**TOPK), planted(500, seed=2), **SHORT)
    assert other.path != first.path


def test_every_row_in_memory_is_in_one_split_as_it_was(lab: Session) -> None:
    x = planted(333)
    rows = lab.dataset(x, validation=0.25)
    held_out = rows.held_out()
    found = torch.cat([rows.rows(0, rows.n_rows).x, held_out.rows(0, held_out.n_rows).x])
    where = np.concatenate([one.inputs[0].positions(0, one.n_rows) for one in (rows, held_out)])
    assert sorted(where) == list(range(333)) and 40 < held_out.n_rows < 130
    assert torch.equal(found, x[torch.from_numpy(where)])
    assert lab.dataset(x, validation=0.0).n_rows == 333


def test_an_iterator_becomes_the_store_that_a_file_would(lab: Session, tmp_path: Path) -> None:
    """Read once, a part at a time; the same rows in other parts, or in a file, are the same store."""
    x = planted(700)
    held: list[int] = []

    def parts(step: int) -> Iterator[Any]:
        for low in range(0, len(x), step):
            held.append(low)
            yield x[low : low + step] if low % (2 * step) else x[low : low + step].double().numpy()

    found = lab.dataset(parts(64), name="mine", validation=0.2)
    assert held == list(range(0, 700, 64)) and found.key.startswith("table-mine-float32-")
    at = found.inputs[0].positions(0, found.n_rows)
    assert torch.equal(found.rows(0, found.n_rows).x, x[at])
    assert found.n_rows + found.held_out().n_rows == 700
    assert lab.dataset(parts(37), name="mine", validation=0.2).key == found.key
    np.save(tmp_path / "mine.npy", x.numpy())
    same = lab.harvest(source="table", table=str(tmp_path / "mine.npy"), validation=0.2, codec="float32")
    assert [one.key for one in same.values()] == [found.key]
    run = lab.train(sae.TopK(**TOPK), parts(100), steps=5, batch=64)
    assert run.finished
    for wrong, message in (
        (iter([]), "rows: there are none"),
        (iter([x[:3], x[:3, :2]]), "part 1 of rows: is 2 wide, those before it are 8"),
        (iter([x[0]]), "part 0 of rows: has the shape"),
        (iter([x[:2], np.full((1, D), np.nan)]), "part 1 of rows: holds NaN"),
    ):
        with pytest.raises(SaeError, match=message):
            lab.dataset(wrong)
    with pytest.raises(SaeError, match="target: rows of an iterator have none"):
        lab.dataset(parts(50), x)
    with pytest.raises(SaeError, match="validation = 2"):
        lab.dataset(parts(50), validation=2)


def test_a_pair_in_memory_makes_a_transcoder(lab: Session) -> None:
    x = planted(800)
    y = torch.cat([x, -x], dim=1)
    run = lab.train(sae.TopK(k=4, d_sae=32), (x, y), **SHORT)
    coder = run.load()
    assert coder.is_transcoder and (coder.d_in, coder.d_out) == (D, 2 * D)
    rows = lab.dataset(x, y)
    batch = next(iter(rows.batches(50, epochs=1)))
    assert torch.equal(batch.y, torch.cat([batch.x, -batch.x], dim=1))
    assert lab.evaluate(run)["fvu"] == pytest.approx(lab.evaluate(coder, rows.held_out())["fvu"], rel=1e-6)
    assert lab.evaluate(coder, (x, y))["fvu"] < 1


def test_tables_of_pandas_and_lists_are_rows_too(lab: Session) -> None:
    pandas = pytest.importorskip("pandas")
    x = planted(50)
    key = lab.dataset(x, validation=0.0).key
    for same in (pandas.DataFrame(x.numpy()), x.tolist(), x.double(), x.clone().requires_grad_()):
        assert lab.dataset(same, validation=0.0).key == key
    assert lab.dataset(x > 1, validation=0.0).key == lab.dataset((x > 1).long(), validation=0.0).key != key


def test_batches_of_a_store_are_everyones_to_loop_over(lab: Session) -> None:
    x = planted(300)
    rows = lab.dataset(x, validation=0.0)
    one, other = ([batch.x for batch in rows.batches(64, epochs=2, seed=1)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert sum(map(len, one)) == 600 and not torch.equal(torch.cat(one)[:300], x)
    assert torch.equal(torch.cat(one)[:300].sort(0).values, x.sort(0).values)


def test_several_dictionaries_see_the_same_batches_and_are_compared(lab: Session) -> None:
    x = planted(600)
    runs = lab.train([sae.TopK(k=1, d_sae=16), sae.TopK(k=3, d_sae=16), sae.L1(d_sae=16, coefficient=0.1)], x, **SHORT)
    assert len({run.name for run in runs}) == 3
    for run in runs:
        lab.evaluate(run.name)
    table = lab.compare()
    assert isinstance(table, Table) and [row["run"] for row in table] == [row["run"] for row in lab.compare(runs)]
    by_k = {row["sae.k"]: row for row in table}
    assert by_k[1]["fvu"] > by_k[3]["fvu"] and {one.key for one in compared()} <= by_k[1].keys()
    assert lab.train(sae.TopK(k=1, d_sae=16), x, **SHORT).path == runs[0].path


def test_a_named_run_is_continued_and_not_taken_for_another(lab: Session) -> None:
    x = planted(500)
    run = lab.train(sae.TopK(**TOPK), x, name="mine", **SHORT)
    assert run.path == lab.runs / "mine" and lab.run("mine").name == lab.run(run.path).name == lab.run().name == "mine"
    assert lab.train(sae.TopK(**TOPK), x, name="mine", **SHORT).path == run.path
    with pytest.raises(sae.SaeError, match="was started with other settings"):
        lab.train(sae.TopK(k=3, d_sae=16), x, name="mine", **SHORT)
    assert run.history()[-1]["step"] == 40 and torch.equal(lab.load("mine").W_dec, run.load().W_dec)


def test_another_tools_dictionary_is_judged_like_ours(lab: Session, tmp_path: Path) -> None:
    made = create(sae.TopK(**TOPK), D, seed=1).eval()
    formats.write(made, formats.Metadata(), tmp_path / "theirs")
    rows = lab.dataset(planted(200))
    found = lab.evaluate(sae.read(tmp_path / "theirs"), rows)
    assert found == lab.evaluate(made, rows) and found["fvu"] > 0 and found["rows"] == rows.n_rows
    assert sae.evaluate(made, rows) == found


def test_text_is_harvested_trained_on_spliced_and_reported(text: tuple[Session, dict[str, sae.Dataset]]) -> None:
    lab, found = text
    assert list(found) == ["1.mlp_in", "1.mlp_out"] and found["1.mlp_in"].d_in == 128
    assert isinstance(lab.dataset("tiny-1.mlp_out").inputs[0], ActivationStore)
    with pytest.raises(sae.SaeError, match=r"^rows = .*ambiguous"):
        lab.dataset()
    rows = lab.dataset("tiny-1.mlp_in", "tiny-1.mlp_out", first=1000)
    assert rows.n_rows == 1000
    run = lab.train(sae.TopK(k=4, d_sae=64), found["1.mlp_out"], steps=5, batch=64)
    model = sae.LanguageModel.boot("tiny", device="cpu", offline=True)
    judged = lab.evaluate(run, model=model, tokens=256)
    assert judged["ce_degradation"] == run.evaluation()["ce_degradation"]  # type: ignore[index]
    latents = sae.attach(model, run.load()).latents(torch.arange(16)[None])
    assert latents.dense().shape == (1, 16, 64)
    page = lab.report(run, rows=256)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    model_again = lab.harvest(preset="tiny", layer=1, site="mlp_out", tokens=2_000, validation_tokens=500, model=model)
    assert model_again["1.mlp_out"].key == found["1.mlp_out"].key


def test_rows_of_other_sources_are_harvested_by_their_settings(lab: Session, tmp_path: Path) -> None:
    presence = {"mode": "iid", "probability": 0.1}
    known = lab.harvest(source="synthetic", rows=600, validation_rows=200, d=D, features=FEATURES, presence=presence)
    run = lab.train(sae.TopK(k=2, d_sae=16), known["synthetic"], **SHORT)
    assert known["synthetic"].truth is not None and lab.evaluate(run)["true_to_learned"] is not None
    np.save(tmp_path / "mine.npy", planted(200).numpy())
    table = lab.harvest(source="table", table=str(tmp_path / "mine.npy"), codec="float32", validation=0.25)
    assert [*table] == ["mine.npy"] and lab.dataset().key == table["mine.npy"].key
    with pytest.raises(sae.SaeError, match=r"^tokens_from: the rows of table come from no tokens"):
        lab.harvest("some", source="table", table=str(tmp_path / "mine.npy"))
    with pytest.raises(sae.SaeError, match=r"^harvest\.source = tabel|^harvest.*tabel"):
        lab.harvest(source="tabel")


def test_errors_speak_of_arguments_and_settings(lab: Session, tmp_path: Path) -> None:
    x = planted(300)
    for given, message in (
        ({"lr": -1}, r"^train\.lr = -1: input should be greater than 0"),
        ({"lrr": 1}, r"^train\.lrr: unknown key; did you mean 'lr'"),
        ({"name": "a/b"}, r"^name = 'a/b': is not the name of a folder"),
        ({"steps": 3, "rows": 4}, r"steps = 3 and rows = 4: give one of them"),
    ):
        with pytest.raises(sae.SaeError, match=message):
            lab.train(sae.TopK(**TOPK), x, **given)
    with pytest.raises(sae.SaeError, match=r"^name = 'x': several dictionaries"):
        lab.train([sae.TopK(**TOPK)], x, name="x")
    for rows, message in (
        (torch.zeros(3), r"^x: has the shape \[3\]"), (torch.zeros(0, 3), r"^x: has the shape \[0, 3\]"),
        (torch.full((2, 2), torch.nan), "^x: holds NaN"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), "^x: holds NaN"),
        ((x, x[1:]), "^y: has 299 rows, x has 300"),
    ):  # fmt: skip
        with pytest.raises(sae.SaeError, match=message):
            lab.train(sae.TopK(**TOPK), rows, **SHORT)
    for nothing in (sae.TopK, "topk", [sae.TopK], []):
        with pytest.raises(sae.SaeError, match=r"^dictionary: .*give"):
            lab.train(nothing, x)  # type: ignore[call-overload]
    for rows in ("words", object(), [[1, 2], [3]], np.array([["a"]]), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(sae.SaeError):
            lab.dataset(rows)
    for called in ("a/b", "..", "", "a b\n"):
        with pytest.raises(sae.SaeError, match=r"^name = .*is not the name of a file"):
            lab.dataset(x, name=called)
    with pytest.raises(sae.SaeError, match=r"^target: is a store, and the rows"):
        lab.dataset(x, "some")
    with pytest.raises(sae.SaeError, match=r"^target: is in memory, and the rows"):
        lab.dataset("some", x)
    with pytest.raises(sae.SaeError, match=r"^validation = 1"):
        lab.dataset(x, validation=1)
    with pytest.raises(sae.SaeError, match=rf"the dictionary reads {D} and writes {D}"):
        lab.evaluate(create(sae.TopK(**TOPK), D), torch.ones(9, D + 1))
    with pytest.raises(sae.SaeError, match=r"^target: a dataset has its targets"):
        lab.dataset(lab.dataset(x), x)
    (tmp_path / "file").touch()
    with pytest.raises(sae.SaeError, match=r"^cache = .*file: is a file"):
        sae.Session(cache=tmp_path / "file")
    assert not lab.runs.exists() or not any(lab.runs.iterdir())


def test_what_stands_for_one_or_several_is_taken_in_each_of_its_forms(lab: Session) -> None:
    """Names and folders of runs and stores as text or paths, in lists and arrays; numbers and devices of libraries."""
    x = planted(300)
    rows = lab.dataset(x, first=np.int32(200))
    assert lab.dataset(rows.inputs[0].path, first=200).key == rows.key and type(rows.n_rows) is int
    state = rows.batches(np.int64(64), seed=np.uint8(3), positions=np.False_).state_dict()
    assert state == rows.batches(64, seed=3).state_dict() and json.loads(json.dumps(state)) == state
    assert len(rows.sample(np.uint8(200), first=np.uint8(150)).x) == 200
    names = [lab.train(sae.TopK(k=k, d_sae=16), rows, name=f"k{k}", steps=2, batch=64).name for k in (1, 2)]
    judged = lab.evaluate(names)
    for several in (tuple(names), np.array(names), dict.fromkeys(names).keys(), [lab.runs / name for name in names]):
        assert lab.evaluate(several) == judged  # type: ignore[arg-type]
    here = sae.Session(lab.cache, lab.runs, device=torch.device("cpu"), offline=np.True_, progress=np.False_)  # type: ignore[arg-type]
    assert here.device == "cpu" and here.evaluate(Path(names[0]), cross_entropy=np.False_) == judged[0]  # type: ignore[call-overload]
    for run in (lab.run("k2").load(device=torch.device("cpu")), sae.load(lab.runs / "k2", device=torch.device("cpu"))):
        assert torch.equal(run.W_dec, lab.load("k2").W_dec)


WRONG: list[tuple[Callable[[Session], object], str]] = [
    (lambda lab: sae.Session(cache=3), r"cache = 3: is not what is meant; give text or a path"),  # type: ignore[arg-type]
    (lambda lab: sae.Session(runs=""), r"runs = '': is not the name of a folder"),
    (lambda lab: sae.Session(cache="a\0b"), r"cache = 'a\\x00b': is not the name of a folder"),
    (lambda lab: sae.Session(device=None), r"device = None: is not"),  # type: ignore[arg-type]
    (lambda lab: sae.Session(progress="yes"), r"progress = 'yes': is not"),  # type: ignore[arg-type]
    (lambda lab: sae.Session(offline="no"), r"offline = 'no': is not .*True or False"),  # type: ignore[arg-type]
    (lambda lab: lab.tokenize(preset="tiny", workers=0), r"workers = 0: is no number of processes"),
    (lambda lab: lab.tokenize(preset=["tiny"]), r"preset: is a list; give text or None"),  # type: ignore[arg-type]
    (lambda lab: lab.tokenize(preset="tiny", tokenz=5), r"tokenize\.tokenz: unknown key; did you mean 'tokens'"),
    (lambda lab: lab.harvest(3), r"tokens_from = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.harvest(""), r"tokens_from = '': is the beginning of every key"),
    (lambda lab: lab.harvest(model=torch.nn.Linear(2, 2)), r"model: is a Linear; give"),  # type: ignore[arg-type]
    (lambda lab: lab.harvest(source="table"), r"harvest\.table: which file the rows are in is not said"),
    (lambda lab: lab.dataset(planted(20), first="a"), r"first = 'a': is not .*a whole number"),  # type: ignore[arg-type]
    (lambda lab: lab.dataset(planted(20), first=30), r"first = 30|30 rows asked for|.*30"),
    (lambda lab: lab.dataset(planted(20), name=3), r"name = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.dataset(planted(20), validation="a"), r"validation = 'a': is not"),  # type: ignore[arg-type]
    (lambda lab: lab.dataset(planted(20)).batches(0), r"batch = 0: is too small; give 1 or more"),
    (lambda lab: lab.dataset(planted(20)).batches(4, seed="a"), r"seed = 'a': is not"),  # type: ignore[arg-type]
    (lambda lab: lab.dataset(planted(20)).batches(4, threads=0), r"threads = 0: is too small; give 1 or more"),
    (lambda lab: lab.dataset(planted(20)).batches(4, rank=2, world=2), r"rank = 2: is none of the 2 from 0 on"),
    (lambda lab: lab.dataset(planted(20)).batches(4, device="gpu"), r"device = gpu: is none; try cpu or cuda:1"),
    (lambda lab: lab.dataset(planted(20)).batches(4, largest=[9.0, 9.0]), r"largest: 2 norms for 1 stores"),
    (lambda lab: lab.dataset(planted(20)).sample(-1), r"count = -1: is too small; give 0 or more"),
    (lambda lab: lab.dataset(planted(20)).sample(1, first=-1), r"first = -1: is too small"),
    (lambda lab: sae.Session(device="meta"), r"device = meta: not usable here"),
    (lambda lab: sae.Session(device="hpu"), r"device = hpu: not usable here"),
    (lambda lab: lab.train(sae.TopK(**TOPK), (planted(9),)), r"rows: a tuple of 1; give a pair"),
    (lambda lab: lab.train(sae.TopK(**TOPK), planted(9), name=3), r"name = 3: is not"),  # type: ignore[call-overload]
    (lambda lab: lab.train(sae.TopK(**TOPK), planted(9), log=3), r"log = 3: is not"),
    (lambda lab: sae.TopK(k=0), r"TopK\.k = 0: input should be greater than or equal to 1$"),
    (lambda lab: sae.TopK(kk=3), r"TopK\.kk: unknown key; did you mean 'k'\?$"),  # type: ignore[call-arg]
    (lambda lab: lab.run(3), r"name = 3: is not what is meant; give an object of Run or text or a path or None$"),  # type: ignore[arg-type]
    (lambda lab: lab.load(object()), r"run: is a object; give"),  # type: ignore[arg-type]
    (lambda lab: sae.load(None), r"run = None: is not"),  # type: ignore[arg-type]
    (lambda lab: sae.read(3), r"source = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.adopt("nonesuch", ""), r"name = '': is not the name of a folder"),
    (lambda lab: lab.push("nonesuch", 3), r"repository = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.export(3, "e"), r"run = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.evaluate([]), r"runs: an empty list"),
    (lambda lab: lab.evaluate(["a", 3]), r"what: holds a int"),  # type: ignore[list-item]
    (lambda lab: lab.evaluate("a", planted(9)), r"rows: a run is judged on held-out rows of its own"),
    (lambda lab: lab.evaluate("a", cross_entropy="no"), r"cross_entropy = 'no': is not"),  # type: ignore[call-overload]
    (lambda lab: lab.compare("nonesuch"), r"nonesuch: no such run"),
    (lambda lab: lab.compare(3), r"runs = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.study("rates"), r"study = 'rates': is not .* an object of Study"),  # type: ignore[arg-type]
    (lambda lab: lab.analyze("a", ["sparsity"]), r"names: is a list; give text"),  # type: ignore[arg-type]
    (lambda lab: lab.probe("a", 3), r"data: is a int; give a file"),
    (lambda lab: lab.probe("a", {"a": (["x"],)}), r"data: what 'a' has is no pair of lists"),
    (lambda lab: lab.match([]), r"runs: an empty list"),
    (lambda lab: lab.decompose(kind="nope"), r"decompose\.kind = nope"),
    (lambda lab: lab.latents_of("a", 3), r"text = 3: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.steer("a", 1.5, "x", 1), r"feature = 1\.5: is not .*a whole number"),  # type: ignore[arg-type]
    (lambda lab: lab.steer("a", 1, "x", ["a"]), r"strength: holds a str; give"),  # type: ignore[list-item]
    (lambda lab: lab.ablate_topic("a", None, "b"), r"topic = None: is not"),  # type: ignore[arg-type]
    (lambda lab: lab.report([]), r"runs: an empty list"),
    (lambda lab: lab.statistics("a", rowz=3), r"report\.rowz: unknown key; did you mean 'rows'"),
    (lambda lab: sae.attach(torch.nn.Linear(2, 2), "a"), r"dictionary = 'a': is not"),  # type: ignore[arg-type]
    (lambda lab: sae.LanguageModel.boot(3), r"name = 3: is not"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_an_argument_that_is_wrong_is_named_in_a_line(case: int, lab: Session) -> None:
    call, line = WRONG[case]
    with pytest.raises(sae.SaeError, match=f"^{line}") as refused:
        call(lab)
    assert "\n" not in str(refused.value)


def test_the_first_rows_of_those_in_memory(lab: Session) -> None:
    assert lab.dataset(planted(200), first=50).n_rows == 50


def test_results_are_shown_as_tables_that_run_nothing() -> None:
    figures = Figures(fvu=0.25, l0=None, details={"a": 1})
    assert (
        "<td>fvu</td><td>0.25</td><td>share of variance" in figures._repr_html_() and "l0" not in figures._repr_html_()
    )
    table = Table([{"run": "<script>", "k": 3}, {"run": "b", "k": None}])
    assert "&lt;script&gt;" in table._repr_html_() and "<script>" not in table._repr_html_()


def test_the_usual_places_are_those_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "r"))
    run = sae.train(sae.TopK(**TOPK), planted(200), **SHORT)
    assert run.path.parent == tmp_path / "r" and (tmp_path / "c" / "activations").is_dir()
    assert sae.evaluate(run)["rows"] == sae.evaluate(run.name)["rows"] > 0


def test_progress_is_told_in_plain_lines(lab: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = sae.Session(lab.cache, lab.runs, device="cpu")
    told.train(sae.TopK(**TOPK), planted(200), **SHORT)
    said = capfd.readouterr()
    assert said.out == "" and "train: 40 steps in" in said.err and "\x1b" not in said.err


def test_a_study_of_rows_in_memory(tmp_path: Path) -> None:
    """What it can be told is said in Python as on the command line; what it decides itself it is not told."""
    lab = Session(tmp_path / "cache", tmp_path / "runs", device="cpu", progress=False)
    base: dict[str, Any] = {"sae": {"arch": "topk", "k": 2, "d_sae": 12}, "steps": 4, "batch": 64, "initial_rows": 64}
    found = lab.study(Rates(ratios=(1, 4), encoder_decay=("none",)), planted(600), seeds=2, **base)
    assert [(row["ratio"], row["seed"]) for row in found.runs] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert [(row["ratio"], row["seeds"]) for row in found.table] == [(1, 2), (4, 2)]
    assert {row["run"] for row in lab.compare()} == {row["run"] for row in found.runs}
    for wrong in ({"decay": 0.5}, {"decoder": {"ratio": 2.0}}):
        with pytest.raises(SaeError, match=r"train\.(decay|decoder.ratio): the study rates decides it itself"):
            lab.study(Rates(), planted(600), **base, **wrong)
