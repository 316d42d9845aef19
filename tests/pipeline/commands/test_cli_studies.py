"""`sae study` as it is typed, on a small language model and its cache."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import done, sae
from support.harvesting import harvest
from support.small_models import made_up, save_model, small_stages, token_store

from sae.cache import catalogue
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.runtime.progress import Silent

SMALL = [
    "--d-sae", 24, "--steps", 6, "--set", "train.batch=64", "--set", "train.initial_rows=64", "--set", "train.lr=0.01",
    "--set", "train.log_every=2", "--set", "eval.tokens=128", "--set", "eval.dead_rows=64",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with small_stages():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """Both layers' residual streams of a random model, training and held-out."""
    root = tmp_path_factory.mktemp("cache")
    model = save_model("gpt2", root / "model")
    stores = [token_store(root, made_up(40, seed=1)), token_store(root, made_up(20, seed=2), split="validation")]
    config = HarvestConfig(
        model=str(model), layer=(0, 1), site=("resid_post",), codec="float32", tokens="all", validation_tokens="all"
    )
    result = harvest(config, stores, root, Silent())
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]])
    return root


def key(cache: Path) -> str:
    """The training store of layer 0."""
    return str(catalogue.latest(cache)["activations"][0])


def typed(cache: Path, folder: Path, *more: object) -> list[object]:
    return ["--cache", cache, "--runs", folder / "runs", "--out", folder / "out", *SMALL, *more]


STUDIES: dict[str, tuple[list[object], int]] = {
    "coefficients": (["--l1", "0.1,1", "--jl", "0.5", "--hybrid-jl", "0.5,5"], 7),
    "activations": (["--k", 4], 5),
    "rates": (["--ratios", "1,4", "--k", 4], 4),
    "layers": (["--layers", "0,1", "--k", 4], 2),
    "alignment": (["--weights", "0,0.5", "--seeds", 2, "--k", 4], 4),
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_leaves_its_files_and_its_repetition_reads_them(cache: Path, tmp_path: Path, study: str) -> None:
    words, count = STUDIES[study]
    store = [] if study == "layers" else ["--activations", key(cache)]
    found = done(f"study {study}", *typed(cache, tmp_path, *words, *store, "--json"))
    runs = found.json["runs"]
    assert found.json["study"] == study and len(runs) == count
    assert all(row["ce_degradation"] is not None and row["fvu"] > 0 for row in runs)
    assert found.json["files"]["plot"] == str(tmp_path / "out" / "plot.png")
    written = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [float(row["ce_degradation"]) for row in written] == [row["ce_degradation"] for row in runs]
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")}
    again = done(f"study {study}", *typed(cache, tmp_path, *words, *store))
    assert f"{count} finished before" in again.err or study == "layers"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == before
    assert f"study of {study}, {count} runs" in again.out and "plot: " in again.out


def test_the_box_is_under_the_table(cache: Path, tmp_path: Path) -> None:
    answer = done("study activations", *typed(cache, tmp_path, "--activations", key(cache), "--k", 4, "--no-ce"))
    lines = answer.out.splitlines()
    framed = [line for line in lines if line.startswith(("│", "|"))]
    assert [line.split()[1] for line in framed[1:]] == ["relu", "shifted_relu", "jumprelu", "topk", "batchtopk"]
    assert "L0 differs, from" in answer.err and "ce_degradation" not in answer.out
    assert list((tmp_path / "runs").rglob("eval.json")) == [], "no language model was asked"


def test_seeds_are_shown_as_mean_and_deviation(cache: Path, tmp_path: Path) -> None:
    words = [
        "--activations",
        key(cache),
        "--k",
        4,
        "--ratios",
        "2",
        "--encoder-decay",
        "cosine",
        "--seeds",
        2,
        "--no-ce",
    ]
    assert " ± " in done("study rates", *typed(cache, tmp_path, *words)).out
    found = done("study rates", *typed(cache, tmp_path, *words, "--json")).json
    assert len(found["runs"]) == 2 and [row["seeds"] for row in found["table"]] == [2]


def test_eval_and_study_judge_alike(cache: Path, tmp_path: Path) -> None:
    """Figures of a run that `sae eval` has judged are those that a study without a language model finds."""
    words = typed(
        cache, tmp_path, "--activations", key(cache), "--k", 4, "--ratios", "1", "--encoder-decay", "none", "--json"
    )
    (whole,) = done("study rates", *words).json["runs"]
    for kept in (tmp_path / "runs" / whole["run"] / "eval").iterdir():
        kept.unlink()
    (rows_only,) = done("study rates", *words, "--no-ce").json["runs"]
    for name in ("fvu", "l0", "dead_fraction", "encoder_decoder_cosine"):
        assert rows_only[name] == pytest.approx(whole[name], rel=1e-6)
    assert rows_only["ce_degradation"] is None


@pytest.mark.parametrize(
    ("study", "words", "says"),
    [
        ("alignment", ["--by", "dec,enc"], "--by dec,enc: input should be 'dec', 'hid' or 'x_hat'"),
        ("coefficients", ["--l1", "0.1,x"], "--l1 0.1,x: write numbers from 0 on with commas between them"),
        ("coefficients", ["--l1", ""], "--l1 is empty"),
        ("coefficients", ["--jl", "0.1,-1"], "--jl 0.1,-1: write numbers from 0 on"),
        ("coefficients", ["--jl", "nan"], "--jl nan: write numbers"),
        ("coefficients", ["--hybrid-jl", "inf"], "--hybrid-jl inf: write numbers"),
        ("coefficients", ["--l1", "0.1,0.10"], "--l1 0.1,0.10: a number is there twice"),
        ("coefficients", ["--set", "harvest.layer=1"], "`sae study` reads train.* and eval.*"),
        ("coefficients", ["--set", "train.sae.nothing=1"], "nothing: unknown key"),
        (
            "coefficients",
            ["--set", "train.sae.arch=l1", "--set", "train.sae.coefficient=3"],
            "--set train.sae.coefficient=3: this study decides sae.coefficient itself",
        ),
        ("coefficients", ["--set", "train.sae.aux_k=3"], "--set train.sae.aux_k=3: this study trains l1, jl, hybrid"),
        (
            "activations",
            ["--set", "train.sae.arch=gated"],
            "this study trains l1, shifted_relu, jumprelu, topk",
        ),
        ("rates", ["--k", 4, "--set", "train.decoder.ratio=3"], "this study decides decoder.ratio itself"),
        ("alignment", ["--k", 4, "--set", "train.align={weight: 3}"], "this study decides align.weight itself"),
        ("alignment", ["--seeds", 10**9], "--seeds 1000000000: input should be less than or equal to 10000"),
        (
            "alignment",
            ["--k", 4, "--out", "table.csv"],
            "--out table.csv: would be a folder, and .csv is the name of a file",
        ),
        ("layers", ["--layers", "0-"], "--layers 0-: is not a whole number"),
        ("activations", ["--k", 99], "k: 99 latents per input, but d_sae: 24 in all"),
        ("rates", ["--ratios", "0,1"], "--ratios 0,1: input should be greater than 0"),
        ("rates", ["--encoder-decay", "none,sine"], "--encoder-decay none,sine: input should be 'none' or 'cosine'"),
        ("rates", ["--k", 4, "--arch", "tpok"], "--arch tpok: unknown architecture; did you mean 'topk'?"),
        ("layers", ["--layers", "0,-1"], "--layers -1: is not a whole number from 0 on"),
        ("layers", ["--layers", "1,1"], "--layers 1,1: 1 is there twice"),
        ("layers", ["--layers", "0,7"], "--layers 7: no resid_post of this beside"),
        ("layers", ["--layers", "0", "--site", "mlp_out"], "--site mlp_out"),
        ("layers", ["--layers", "0", "--site", "nowhere"], "--site nowhere: the sites are"),
        ("layers", ["--layers", "0", "--device", "nothing"], "--device nothing: not usable here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    cache: Path, tmp_path: Path, study: str, words: list[object], says: str
) -> None:
    store = ["--k", 4] if study == "layers" else ["--activations", key(cache)]
    answer = sae(f"study {study}", *typed(cache, tmp_path, *store, *words))
    assert answer.code == 2 and says in answer.complaint
    assert list(tmp_path.iterdir()) == []


def test_the_results_folder_is_no_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    answer = sae("study coefficients", *typed(cache, tmp_path, "--activations", key(cache)))
    assert answer.code == 2 and "--out" in answer.complaint and "is a file, not a folder" in answer.complaint


def test_missing_layers_come_with_a_command_that_makes_them(cache: Path, tmp_path: Path) -> None:
    answer = sae("study layers", *typed(cache, tmp_path, "--layers", "0,1", "--site", "mlp_out", "--k", 4))
    command = answer.complaint.split("`")[1]
    done(command.removeprefix("sae "), "--cache", cache)
    found = done(
        "study layers", *typed(cache, tmp_path, "--layers", "0,1", "--site", "mlp_out", "--k", 4, "--json")
    ).json
    assert [row["layer"] for row in found["runs"]] == [0, 1] and "mmcs_previous" not in found["runs"][0]
