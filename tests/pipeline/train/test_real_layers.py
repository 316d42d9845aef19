"""Layers of a real small Llama read and written: trained, judged, compared; stores that do not go together."""

import json
from pathlib import Path

import pytest
from support.command_line import done, sae

KINDS = {
    "skip": "--arch topk --d-sae 64 --k 4 --set train.sae.skip=true --input 1.mlp_in --target 1.mlp_out",
    "crosscoder": "--arch crosscoder --d-sae 64 --k 4 --input 1.mlp_out,2.mlp_out",
}


@pytest.mark.slow
def test_layers_of_a_real_model(shared_data: Path, tmp_path: Path) -> None:
    model, cache = shared_data / "models" / "stories260K" / "hf", tmp_path / "cache"
    text = (shared_data / "text" / "tinystories_sample.txt").read_text().split("\n\n")
    place, runs = f"--cache {cache}", f"--cache {cache} --runs {tmp_path / 'runs'} --device cpu"
    for name, documents in (("other", text[80:90]), ("one", text[:80])):
        lines = [json.dumps({"text": one}) for one in documents]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        done(f"tokenize --source {tmp_path / name}.jsonl --tokenizer {model} --set tokenize.validation=0.2 {place}")
        done(f"harvest --model {model} --layer 1,2 --site mlp_in,mlp_out --codec float32 --device cpu {place}")
    keys = {path.name.split("-float32")[0]: path.name for path in sorted((cache / "activations").iterdir())}
    other = keys["hf-1.mlp_out-other-hf-128"]
    train = f"train --batch 128 --steps 80 --lr 1e-2 {runs}"
    for name, said in KINDS.items():
        done(f"{train} {said} --name {name}")
        judged = done(f"eval {name} --tokens 512 --set eval.dead_rows=0 --json {runs}").json
        assert judged["fvu"] < 1 and judged["ce_degradation"] is not None and judged["bits"] > 0
        assert (judged.get("jacobian_cosine") is not None) == (name == "skip")
    done(f"{train} --arch fsq --input 1.mlp_out --name fsq")
    done(f"report fsq {runs}")
    done(f"eval fsq --tokens 512 --set eval.dead_rows=0 {runs}")
    done(f"decompose --input 1.mlp_in --components 8 --batch 256 --steps 5 --set decompose.judged=1 --name spd {runs}")
    rows = done(f"compare --x active_parameters --json --runs {tmp_path / 'runs'}").json["runs"]
    assert {row["run"] for row in rows} == {*KINDS, "fsq", "spd"}
    assert all(row[cost] > 0 for row in rows for cost in ("fvu", "active_parameters", "bits"))
    topk, crosscoder = (f"--arch {arch} --k 2 --d-sae 8" for arch in ("topk", "crosscoder"))
    study = f"study mlp --no-ce --steps 2 --d-sae 16 --ks 2 --importances 1e-3 --out {tmp_path / 'out'}"
    wrong = {
        f"{train} {topk} --input 1.mlp_in --target {other}": "was made from other tokens than hf-1.mlp_in",
        f"{train} {crosscoder} --input 1.mlp_out,{other}": "was made from other tokens than hf-1.mlp_out",
        f"{train} {topk} --input 2.mlp_in --target 1.mlp_out": "2.mlp_in is computed no earlier than 1.mlp_out",
        f"{train} --arch molt --input 1.mlp_out --target 1.mlp_in": "1.mlp_out is computed no earlier than 1.mlp_in",
        f"decompose --input 1.mlp_in --target {other} {runs}": "was made from other tokens than hf-1.mlp_in",
        f"decompose --input 1.mlp_in --target 2.mlp_out {runs}": "is not what one MLP reads and gives",
        f"eval skip --activations {other} {runs}": "was made from other tokens than hf-1.mlp_out",
        f"{study} --activations {other} {runs}": "no held-out rows beside it",
    }
    for command, line in wrong.items():
        answer = sae(command)
        assert answer.code == 2 and line in answer.complaint, (command, answer.err)
