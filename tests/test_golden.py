"""What no change of the code may change: keys and bytes of stores, names and files of runs, figures, keys of `--json`.

All of it goes through the command line and the files it leaves, never through a module. `data/golden.json` is what the
version before the code was rearranged left; `PYTHONPATH=. python tests/test_golden.py` writes it anew, which is right
only where a new default makes *new* stores or runs differ, and then the difference is to be read line by line.
"""

import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import done

GOLDEN = Path(__file__).parent / "data" / "golden.json"
WORDS = "the of store row latent model token layer norm writes reads fires above below each one two every small"
ARITHMETIC = ("rows", "row_norm", "row_scale", "col_mean", "col_scale")  # arrays that processors round differently
SYNTHETIC = "--d 8 --features 16 --groups 4 --active 2 --rows 1 --set synthesize.validation_rows=1 --json"
ALL_ROWS = "train.outliers=none"  # as by default before there was a rule
SMALL = f"--device cpu --threads 1 --set train.log_every=5 --set train.initial_rows=512 --set {ALL_ROWS}"
DEMO = (
    "tokenize.tokens=60000", "tokenize.validation_tokens=4096", "harvest.tokens=10000",
    "harvest.validation_tokens=4096", "train.steps=20", "train.batch=512", "train.sae.d_sae=256",
    "train.log_every=5", "eval.tokens=1024", "eval.dead_rows=0", ALL_ROWS,
)  # fmt: skip
FOLDERS = sorted((Path(__file__).parent / "data" / "before").glob("*.tar.xz"))
LOOSE = 0.02  # of figures that depend on how a processor rounds


def documents(path: Path) -> Path:
    """Made-up text: 60 documents of words that a linear congruential generator picks."""
    words, state, lines = WORDS.split(), 1, []
    for number in range(60):
        picked = [f"document {number}:"]
        for _ in range(120):
            state = (1103515245 * state + 12345) % 2**31
            picked.append(words[(state >> 16) % len(words)])
        lines.append(json.dumps({"text": " ".join(picked)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def digests(store: Path, *, leaving_out: tuple[str, ...] = ()) -> dict[str, str]:
    """A digest of every file of a store that its recipe decides."""
    every = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    kept = [path for path in every if str(path) not in ("lock", "hints.json") and path.parts[0] not in leaving_out]
    return {str(path): hashlib.sha256((store / path).read_bytes()).hexdigest()[:16] for path in kept}


def keys(value: Any) -> Any:
    """The keys of a JSON value, at every depth; of a list those of its first element."""
    if isinstance(value, dict):
        return {key: keys(inside) for key, inside in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


def tensors(path: Path) -> dict[str, list[object]]:
    """The dtypes and shapes that a safetensors file says it has."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: [one["dtype"], *one["shape"]] for name, one in sorted(header.items()) if name != "__metadata__"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_run(run: Path) -> dict[str, Any]:
    """What a finished run folder says of itself."""
    metrics = lines(run / "metrics.jsonl")
    cfg = json.loads((run / "cfg.json").read_text())
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "config": keys(json.loads((run / "config.json").read_text())),
        "cfg": {**cfg, "metadata": keys(cfg["metadata"])},
        "weights": tensors(run / "sae_weights.safetensors"),
        "checkpoint": tensors(run / "checkpoint.safetensors"),
        "metrics": [keys(metrics[0]), keys(metrics[-1])],
        "losses": [line["loss"] for line in metrics],
    }


def synthetic(root: Path) -> dict[str, Any]:
    """Rows of known features as int8 and float32, and a sweep over two k and two seeds on the first."""
    where, runs = ["--cache", root / "cache"], ["--cache", root / "cache", "--runs", root / "runs"]
    found: dict[str, Any] = {"stores": {}, "json": {}, "runs": {}}
    for codec in ("int8", "float32"):
        answer = done(f"synthesize {SYNTHETIC} --codec {codec}", *where).json
        found["json"]["synthesize"] = keys(answer)
        found["stores"] |= {store["key"]: digests(Path(store["path"])) for store in answer["stores"]}
    sweep = f"train {SMALL} --activations synthetic-groups-16in8-int8 --d-sae 16 --batch 128 --steps 10 --json"
    answer = done(f"{sweep} --sweep k=2,4 --seeds 2 --lr 0.01", *runs).json
    found["json"]["sweep"] = keys(answer)
    for row in answer["runs"]:
        run = root / "runs" / row["run"]
        judged = done("eval --json --device cpu --threads 1 --set eval.dead_rows=512", row["run"], *runs).json
        found["json"]["eval"] = keys(judged)
        found["runs"][row["run"]] = of_run(run) | {"figures": {name: judged[name] for name in ("fvu", "l0")}}
    found["json"]["compare"] = keys(done("compare --json --csv", root / "table.csv", "--runs", root / "runs").json)
    found["json"]["table"] = dict.fromkeys((root / "table.csv").read_text().splitlines()[0].split(","))
    study = "study rates --ratios 2 --encoder-decay none --no-ce --k 2 --activations synthetic-groups-16in8-int8 --json"
    small = (
        f"--d-sae 16 --steps 5 --device cpu --threads 1 --set train.batch=128 --set eval.dead_rows=512 --set {ALL_ROWS}"
    )
    answer = done(f"{study} {small}", "--out", root / "out", *runs).json
    found["json"]["study"] = keys(answer)
    (row,) = answer["runs"]
    found["study"] = {"run": row["run"], "files": sorted(path.name for path in (root / "out").iterdir())}
    for command in ("list", "cache ls", "cache du", "cache verify", "cache gc --yes"):
        found["json"][command] = keys(
            done(f"{command} --json", *(["--runs", root / "runs"] if command == "list" else where)).json
        )
    return found


def language_model(root: Path) -> dict[str, Any]:
    """Text through the embedded model, a dictionary, its figures and its page."""
    where, runs = ["--cache", root / "cache"], ["--cache", root / "cache", "--runs", root / "runs"]
    found: dict[str, Any] = {"stores": {}, "json": {}, "runs": {}, "recipes": {}}
    text = documents(root / "text.jsonl")
    answer = done("tokenize --preset tiny --workers 1 --json --set tokenize.validation=0.2 --source", text, *where).json
    found["json"]["tokenize"] = keys(answer)
    found["stores"] |= {store["key"]: digests(Path(store["path"])) for store in answer["stores"]}
    answer = done("harvest --preset tiny --device cpu --threads 1 --json", *where).json
    found["json"]["harvest"] = keys(answer)
    for store in answer["stores"]:
        path = Path(store["path"])
        left = tuple(f"{name}/c" for name in ARITHMETIC)
        decided = {name: digest for name, digest in digests(path).items() if not name.startswith(left)}
        decided.pop("manifest.jsonl")  # which has checksums of the arithmetic
        found["stores"][store["key"]] = decided
        recorded = lines(path / "manifest.jsonl")
        found["recipes"][store["key"]] = json.loads((path / "recipe.json").read_text())["recipe"]
        found["recipes"][store["key"] + " windows"] = [line["line"].get("rows", line["line"]) for line in recorded]
    answer = done(f"train --preset tiny {SMALL} --steps 20 --batch 256 --d-sae 64 --json", *runs).json
    found["json"]["train"] = keys(answer)
    judged = done("eval --json --device cpu --threads 1 --tokens 1024 --set eval.dead_rows=0", *runs).json
    found["json"]["eval of a language model"] = keys(judged)
    run = Path(answer["run"])
    assert json.loads((run / "eval" / "eval.json").read_text()).keys() >= {"fvu", "l0", "ce_clean", "ce_spliced"}
    found["json"]["report"] = keys(done("report --json --device cpu --threads 1", *runs).json)
    found["json"]["features"] = keys(json.loads(next(run.rglob("features.json")).read_text()) | {"vocabulary": None})
    figures = {name: judged[name] for name in ("fvu", "l0", "ce_clean", "ce_spliced", "ce_zero", "ce_mean")}
    found["runs"][run.name] = of_run(run) | {"figures": figures}
    return found


def demo(root: Path) -> dict[str, Any]:
    """The demo, smaller."""
    settings = [word for setting in DEMO for word in ("--set", setting)]
    answer = done("demo --device cpu --threads 1 --json", *settings, "--cache", root / "cache", "--runs", root / "runs")
    run = Path(answer.json["run"])
    stores = [path.name for kind in ("tokens", "activations") for path in sorted((root / "cache" / kind).iterdir())]
    return {"json": {"demo": keys(answer.json)}, "runs": {run.name: of_run(run)}, "stores": dict.fromkeys(stores)}


PIPELINES = {"synthetic": synthetic, "language_model": language_model, "demo": demo}


def lacking(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """The keys of before that are there no more."""
    if isinstance(before, dict):
        for key, inside in before.items():
            if not isinstance(now, dict) or key not in now:
                yield f"{where}.{key}"
            else:
                yield from lacking(inside, now[key], f"{where}.{key}")
    elif isinstance(before, list) and before:
        yield from lacking(before[0], now[0] if isinstance(now, list) and now else None, f"{where}[]")


@pytest.mark.parametrize("name", ["synthetic", "language_model", pytest.param("demo", marks=pytest.mark.slow)])
def test_what_was_before_is_now(name: str, tmp_path: Path) -> None:
    before = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    now = json.loads(json.dumps(PIPELINES[name](tmp_path)))
    assert list(lacking(before["json"], now["json"])) == []
    for part in before.keys() - {"json", "runs"}:
        assert now[part] == before[part], part
    assert now["runs"].keys() == before["runs"].keys()
    for run, was in before["runs"].items():
        found = now["runs"][run]
        assert set(was["files"]) <= set(found["files"])
        assert list(lacking([was["config"], was["metrics"][0]], [found["config"], found["metrics"][0]])) == []
        assert list(lacking(was["metrics"][1], found["metrics"][1])) == []
        assert found["cfg"] == {**was["cfg"], "metadata": found["cfg"]["metadata"]}
        assert list(lacking(was["cfg"], found["cfg"])) == []
        assert (found["weights"], found["checkpoint"]) == (was["weights"], was["checkpoint"])
        assert found["losses"] == pytest.approx(was["losses"], rel=LOOSE)
        assert found.get("figures", {}) == pytest.approx(was.get("figures", {}), rel=LOOSE)


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name.split(".")[0])
def before(request: pytest.FixtureRequest, tmp_path: Path) -> list[object]:
    """A cache and runs that an earlier version made, with smaller windows than today's; as options.

    A token store, rows of known features, the runs `finished` and `unfinished` (stopped at step 7 of 12, a checkpoint
    at 4), and a study of two decoder rates.
    """
    with tarfile.open(request.param) as packed:
        packed.extractall(tmp_path, filter="data")
    return ["--cache", tmp_path / "cache", "--runs", tmp_path / "runs"]


def test_folders_of_before_are_read(before: list[object], tmp_path: Path) -> None:
    where, untouched = before[:2], digests(tmp_path / "cache")
    listed = done("cache ls --json", *where).json
    assert sorted(store["rows"] for store in listed if store["kind"] == "activations") == [128, 512]
    assert [store["complete"] for store in listed] == 3 * [True]
    done("cache verify --json", *where)
    runs = {run["name"]: run["help"] for run in done("list --json", *before[2:]).json["runs"]}
    assert runs["finished"].startswith("finished") and runs["unfinished"].startswith("not finished") and len(runs) == 4

    kept = json.loads((tmp_path / "runs" / "finished" / "eval" / "eval.json").read_text())
    again = done("eval finished --json --device cpu --threads 1 --replace --set eval.dead_rows=64", *before).json
    kept.pop("crc", None)
    assert list(lacking(kept, again)) == []
    assert [again[name] for name in ("fvu", "l0")] == pytest.approx([kept[name] for name in ("fvu", "l0")], rel=LOOSE)
    assert done("compare --json finished unfinished", *before[2:]).json["runs"][0]["fvu"] == again["fvu"]

    done("train --resume --name unfinished --device cpu --threads 1 --json", *before)
    finished, resumed = (lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("finished", "unfinished"))
    assert [line["step"] for line in resumed] == [line["step"] for line in finished]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in finished], rel=LOOSE)
    assert digests(tmp_path / "cache") == untouched


def test_a_study_of_before_has_the_figures_of_now(before: list[object], tmp_path: Path) -> None:
    old = json.loads((tmp_path / "runs" / "study" / "results.json").read_text())["runs"]
    saved = [
        path for path in (tmp_path / "runs").rglob("*.safetensors") if path.parent.name != "eval"
    ]  # is judged again
    weights = {path: path.read_bytes() for path in saved}
    study = "study rates --ratios 1,2 --encoder-decay none --no-ce --k 2 --json --device cpu"
    small = ("batch=32", "sae.d_sae=16", "steps=12", "initial_rows=64", "lr=0.01", "outliers=none")
    small += ("sae.aux_share=none", "sae.aux_coefficient=0.03125", "sae.dead_after=1000000", "betas=[0.9,0.999]")
    settings = ["--set", "eval.dead_rows=64", *(word for one in small for word in ("--set", f"train.{one}"))]
    again = done(study, "--out", tmp_path / "again", *settings, *before)
    if "-k2-" in old[0]["run"]:  # names have told of k since before this version
        assert "2 finished before" in again.err
        assert [row["run"] for row in again.json["runs"]] == [row["run"] for row in old]
    for row, was in zip(again.json["runs"], old, strict=True):
        assert list(lacking(was, row)) == []
        assert row["fvu"] == pytest.approx(was["fvu"], rel=LOOSE)
    assert {path: path.read_bytes() for path in weights} == weights


if __name__ == "__main__":
    written = {}
    for title, pipeline in PIPELINES.items():
        with tempfile.TemporaryDirectory() as folder:
            written[title] = pipeline(Path(folder))
    sys.stdout.write(json.dumps(written, indent=1) + "\n")
