"""`sae train --sweep` and `sae compare` as they are typed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.command_line import done, sae
from support.small_stores import shrunk, write_activations

from sae.cache import activations
from sae.cache.runs import Run
from sae.cache.store.manifest import Windows
from sae.pipeline.commands.bars import Bars
from sae.pipeline.commands.train import say_rows
from sae.pipeline.train.stage import TrainConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", 64)
        patch.setattr(activations, "WINDOWS", Windows(64, 256))
        root = tmp_path_factory.mktemp("cache")
        rows = torch.randn(576, 8, generator=torch.Generator().manual_seed(0))
        write_activations(root, rows[:512], ended=True)
        write_activations(root, rows[512:], ended=True, split="validation")
        yield root


def train(cache: Path, runs: Path, *more: object) -> list[object]:
    fixed = ["--d-sae", "64", "--batch", "64", "--steps", "4", "--set", "train.initial_rows=64"]
    return ["train", "--cache", cache, "--runs", runs, *fixed, *more]


def typed(words: list[object]) -> tuple[str, list[object]]:
    return str(words[0]), words[1:]


def test_a_sweep_and_its_comparison(cache: Path, tmp_path: Path) -> None:
    command, rest = typed(train(cache, tmp_path, "--sweep", "k=2,4", "--sweep", "lr=1e-3", "--seeds", 2, "--json"))
    rows = done(command, *rest).json["runs"]
    assert [(row["sae.k"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    again = done(command, *rest)
    assert again.json["runs"] == rows and "4 finished before" in again.err

    found = done("compare", "--runs", tmp_path, "--csv", tmp_path / "table.csv", "--json").json
    assert sorted(row["run"] for row in found["runs"]) == sorted(row["run"] for row in rows)
    assert Path(found["plot"]).stat().st_size > 1000
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5
    merged = done("compare", "--runs", tmp_path, "--over-seeds", "--json").json["runs"]
    assert [row["seeds"] for row in merged] == [2, 2]
    two = done("compare", rows[0]["run"], rows[2]["run"], "--runs", tmp_path)
    assert rows[0]["run"] in two.out and rows[1]["run"] not in two.out and "plot: " in two.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sweep", "k"], "--sweep k: write it as KEY=VALUE,VALUE"),
        (["--sweep", "k=2,4", "--name", "x"], "leave out --name and --resume"),
        (["--seeds", 2, "--resume"], "leave out --name and --resume"),
        (["--sweep", "k=2,4", "--k", 3], "--k 3: --sweep sae.k=2 says otherwise; give one of the two"),
        (["--sweep", "nothing=2,4"], "--sweep nothing=2: these settings have no nothing"),
        (["--sweep", "arch=topk,tpok"], "tpok: unknown architecture; did you mean 'topk'?"),
    ],
)
def test_what_cannot_be_swept(cache: Path, tmp_path: Path, words: list[object], says: str) -> None:
    command, rest = typed(train(cache, tmp_path, *words))
    answer = sae(command, *rest)
    assert answer.code == 2 and says in answer.complaint
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_which_one_diverges_finishes_the_others(cache: Path, tmp_path: Path) -> None:
    words = ["--sweep", "lr=1e-3,1e30", "--sweep", "data_seed=0,1", "--set", "train.clip=null", "--json"]
    command, rest = typed(train(cache, tmp_path, *words))
    answer = sae(command, *rest)
    assert answer.code == 2 and answer.complaint.count("try a smaller --lr") == 2  # one a pass
    assert len(answer.json["runs"]) == 2
    listed = {run["name"]: run["help"] for run in done("list", "--runs", tmp_path, "--json").json["runs"]}
    assert sorted(help.split()[0] for help in listed.values()) == ["diverged", "diverged", "finished,", "finished,"]


def judge(run: Path, rows: int) -> None:
    """What `sae eval` would leave."""
    found = {
        "fvu": 0.25,
        "row_error": 0.2,
        "bits": 9.0,
        "l0": 2.5,
        "dead_fraction": 0.0,
        "rows": rows,
        "details": {"dead_rows": rows},
    }
    Run(run).write_json("eval/eval.json", found)


def test_what_was_judged_on_how_much_is_said(cache: Path, tmp_path: Path) -> None:
    command, rest = typed(train(cache, tmp_path, "--sweep", "k=2,4", "--seeds", 2, "--json"))
    first, second, third, last = [tmp_path / row["run"] for row in done(command, *rest).json["runs"]]
    for run, rows in ((first, 1008), (second, 1008), (third, 64_488)):
        judge(run, rows)
    table = done("compare", "--runs", tmp_path)
    assert "judged on 1,008 to 64,488 held-out rows: compare only what is alike" in table.err
    assert f"not judged on held-out rows: {last.name}; `sae eval RUN` does" in table.err
    assert "64,488" in table.out and last.name in table.out
    merged = done("compare", "--runs", tmp_path, "--over-seeds", "--json").json["runs"]
    assert [(row["sae.k"], row["rows"], row["seeds"], row["fvu"]) for row in merged] == [
        (2, 1008, 2, 0.25), (4, 64_488, 1, 0.25), (4, None, 1, None),
    ]  # fmt: skip
    judge(third, 1008)
    alike = done("compare", first.name, second.name, third.name, "--runs", tmp_path)
    assert "judged on" not in alike.err and "dead_rows" not in alike.out


def test_several_runs_are_judged_by_one_command(cache: Path, tmp_path: Path) -> None:
    command, rest = typed(train(cache, tmp_path, "--sweep", "k=2,4", "--json"))
    names = [row["run"] for row in done(command, *rest).json["runs"]]
    places = ("--cache", cache, "--runs", tmp_path, "--no-ce")
    found = done("eval", *names, names[0], *places, "--json").json
    assert found["failed"] == [] and [one.pop("run") for one in found["runs"]] == names
    assert [one.pop("path") for one in found["runs"]] == [str(tmp_path / name) for name in names]
    assert found["runs"] == [Run(tmp_path / name).evaluation() for name in names]
    assert found["runs"][0] == done("eval", names[0], *places, "--json").json
    table = done("eval", *names, *places).out
    assert table.startswith("2 runs") and all(name in table for name in names) and "fvu" in table
    (tmp_path / names[0] / "sae_weights.safetensors").write_bytes(b"nothing")
    answer = sae("eval", *names, *places, "--json")
    assert answer.code == 3 and answer.complaint.startswith(f"{names[0]}: ")
    (failed,), (fine,) = answer.json["failed"], answer.json["runs"]
    assert [failed["run"], fine["run"]] == names and failed["path"] == str(tmp_path / names[0])
    refused = sae("eval", names[1], *places, "--tokens", "500")
    assert (
        refused.code == 2
        and refused.complaint == "--tokens 500: no tokens are judged with --no-ce; leave one of the two out"
    )


def test_verify_reads_runs_as_well(cache: Path, tmp_path: Path) -> None:
    command, rest = typed(train(cache, tmp_path, "--name", "first", "--json"))
    done(command, *rest)
    judge(tmp_path / "first", 64)
    look = ("cache verify", "--cache", cache, "--runs", tmp_path)
    stores = len(done("cache ls", "--cache", cache, "--json").json)
    assert done(*look).out == f"{stores} store{'s' if stores > 1 else ''} and 1 run, every byte as committed\n"
    assert done(*look, "--json").json["runs"] == ["first"]
    for name, change in (("config.json", b'"batch": 64'), ("eval/eval.json", b"0.25"), ("metrics.jsonl", b'"loss": ')):
        path = tmp_path / "first" / name
        data = path.read_bytes()
        assert change in data
        path.write_bytes(data.replace(change, change[:-1] + b"9", 1))
        answer = sae(*look)
        assert answer.code == 3 and name in answer.complaint, answer
        path.write_bytes(data)
    done(*look)


@pytest.mark.parametrize("words", [["--plot", "taken/front.png"], ["--csv", "taken/a.csv"], ["--csv", "runs"]])
def test_comparing_looks_first_whether_it_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("sae.pipeline.report.compare.compare", lambda *_: pytest.fail("it went to work"))
    answer = sae("compare", *words)
    assert answer.code == 2 and ("cannot write here" in answer.complaint or "is a folder" in answer.complaint)


def test_comparing_nothing_says_what_to_run(tmp_path: Path) -> None:
    answer = sae("compare", "--runs", tmp_path)
    assert answer.code == 2 and "sae train" in answer.complaint


@pytest.mark.parametrize(("rows", "said"), [(100, "rows 100: steps see 64 each, so 64 are seen in 1"), (128, None)])
def test_rows_that_are_no_whole_number_of_batches_are_said(rows: int, said: str | None) -> None:
    notes: list[str] = []
    bars = Bars()
    bars.note = notes.append  # type: ignore[method-assign]
    say_rows([TrainConfig(rows=rows, batch=64), TrainConfig(rows=rows, batch=64, seed=1), TrainConfig()], bars)
    assert notes == ([] if said is None else [said])
