"""Explanations of planted latents, by tables of tokens: what they are made from, what they score, what is kept."""

import json

import numpy as np
import pytest
from support.command_line import sae
from support.planted_text import BEGIN, NOISE, T

from sae.cache import catalogue
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.runs import EXPLANATIONS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.corpus import EXPLAINED, JUDGED, Corpus
from sae.pipeline.explain.stage import explain, summary
from sae.pipeline.formats import trained
from sae.pipeline.interpret.explanations import explanations
from sae.pipeline.runtime.workplace import Workplace


def test_a_latent_of_one_token_is_foretold_and_one_that_fires_at_random_is_not(run: Run, place: Workplace) -> None:
    found = explain(run, place)
    assert found is not None and explanations(run) == found
    tokens = [one for one in found.features if one.feature < NOISE]
    noise = [one for one in found.features if one.feature >= NOISE]
    assert len(tokens) > 30 and len(noise) >= 3
    for one in tokens:
        detection, fuzzing, simulation = one.scores
        assert one.explanation is not None and one.explanation.count(" ") >= 2
        assert (one.score, one.control) == (detection.score, detection.control)
        assert detection.score == fuzzing.score == 1.0 and (simulation.score or 0) > 0.8
        assert detection.balanced_accuracy == 1.0 and simulation.balanced_accuracy == 1.0
        assert one.control_feature not in (None, one.feature) and not one.errors
    told = summary(found)
    assert abs(told["detection"]["control"] - 0.5) < 0.06 and abs(told["fuzzing"]["control"] - 0.5) < 0.06
    assert abs(told["simulation"]["control"]) < 0.05
    for scoring, chance, room in ((0, 0.5, 0.12), (1, 0.5, 0.12), (2, 0.0, 0.12)):
        assert abs(np.mean([one.scores[scoring].score for one in noise]) - chance) < room  # type: ignore[misc]
    assert explain(run, place) == found, "every choice is seeded"


def test_what_is_judged_on_was_not_explained_from(run: Run, place: Workplace) -> None:
    dataset = trained.dataset_of(run, place.cache)
    text = dataset.provenance.text
    assert text is not None
    tokens = catalogue.of_recipe(place.cache, TokenStore, text.recipe)
    assert tokens is not None
    import torch

    corpus = Corpus(dataset, tokens, dataset.n_rows, window=12, seed=1)
    coder = trained.load_latents(run)
    for one in corpus.materials(coder, [20, 21, NOISE], (8, 6, 6), place.progress, torch.device("cpu")):
        assert [len(one.examples), len(one.active), len(one.silent)] == [8, 6, 6]
        explained = {window.document for window in one.examples}
        judged = {window.document for window in (*one.active, *one.silent)}
        assert not explained & judged
        every = [window.tokens for window in (*one.examples, *one.active, *one.silent)]
        assert len(set(every)) == len(every)
        strengths = [max(window.activations) for window in one.examples]
        assert strengths == sorted(strengths, reverse=True) and strengths[0] > 0
        assert not any(any(window.fires) for window in one.silent)
        flat = tokens.contexts(0, tokens.n_contexts).reshape(-1)
        documents = tokens.document_ids(0, tokens.n_contexts).reshape(-1)
        for window in (*one.examples, *one.active, *one.silent):
            span = slice(window.position, window.position + len(window.tokens))
            assert tuple(flat[span]) == window.tokens and len(window.tokens) <= 12
            assert set(documents[span]) == {window.document} and window.position // T == (span.stop - 1) // T
            assert BEGIN not in window.tokens, "which has no row"
            if one.latent < NOISE:
                assert [token == one.latent for token in window.tokens] == [*window.fires]
    assert {*corpus.half} == {EXPLAINED, JUDGED}


def test_the_command_says_it_in_json_and_in_a_table(run: Run, place: Workplace) -> None:
    where = ["--cache", place.cache, "--runs", place.runs, "--device", "cpu"]
    answer = sae("explain planted --backend tokens --latents 1,7,8,9,10,12 --json", *where)
    assert answer.code == 0, answer.err
    features = answer.json["features"]
    assert [one["feature"] for one in features] == [1, 7, 8, 9, 10, 12]
    assert all({"feature", "explanation", "score", "control"} <= one.keys() and one["score"] == 1.0 for one in features)
    plain = sae("explain planted --latents 1,7,8,9,10,12", *where)
    assert plain.code == 0 and "detection: 1 ± 0, control" in plain.out
    for letter in "\x1b\x00\u202e":  # which the vocabulary has
        assert letter not in plain.out and letter not in plain.err
    kept = explanations(run)
    assert kept is not None and [one.feature for one in kept.features] == [1, 7, 8, 9, 10, 12]
    alone = sae("explain planted --latents 20 --json", *where)
    assert alone.json["features"][0]["control"] is not None and len(alone.json["features"]) == 1
    assert alone.json["features"][0]["control_feature"] != 20
    kept = explanations(run)
    assert kept is not None and [one.feature for one in kept.features] == [1, 7, 8, 9, 10, 12, 20], "others are kept"


def test_what_there_is_too_little_of_is_said_and_has_no_score(run: Run, place: Workplace) -> None:
    found = explain(run, place, ExplainConfig(latents=(BEGIN, 20), rows=4000))
    assert found is not None
    dead, alive = found.features
    assert dead.explanation is dead.score is dead.control is None
    assert dead.errors == ["0 contexts it fires in to explain it from, of 4 at least; search more `rows`"]
    assert alive.score == 1.0 and alive.control is not None
    with pytest.raises(SaeError, match="no latent got a score, the first one since 0 contexts"):
        explain(run, place, ExplainConfig(latents=(BEGIN,)))
    kept = explanations(run)
    assert kept is not None and len(kept.features) == 2, "which was there stays"
    with pytest.raises(SaeError, match="rows = 40: no latent of planted fires in enough contexts"):
        explain(run, place, ExplainConfig(rows=40))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("--latents 44", "the dictionary has latents 0 to 43"),
        ("--backend nobody", "--backend nobody: no such backend; there are local, openai, tokens"),
        ("--most-cost 1", "most_cost needs price_in and price_out"),
        ("--scoring guessing", "detection"),
        ("--scoring detection,detection", "there twice"),
        ("--backend openai", "--backend openai: needs a model that the server has; name it with --model"),
        ("--backend openai --model m", "no key; set OPENAI_API_KEY"),
        ("--backend openai --model m --base-url ftp://x", "is no address of a server"),
        ("--backend openai --model m --base-url http://me:pass@x/v1", "holds a name or a password"),
        ("--backend openai --model m --base-url https://example.com/v1 --offline", "network is not to be touched"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    run: Run, place: Workplace, said: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    answer = sae(f"explain planted {said}", "--cache", place.cache, "--runs", place.runs)
    assert answer.code == 2 and complaint in answer.complaint and "pass@" not in answer.err


def test_a_damaged_file_is_said_and_not_written_over(run: Run, place: Workplace) -> None:
    explain(run, place, ExplainConfig(latents=(20, 21), scoring=("detection",)))
    path = run.path / EXPLANATIONS
    data = path.read_bytes()
    path.write_bytes(data.replace(b"fires on", b"fires in"))
    with pytest.raises(DamagedStore, match=r"explanations\.json"):
        explain(run, place, ExplainConfig(latents=(20, 21)))
    path.write_text(json.dumps({"features": [{"feature": "x"}]}))
    run.sealed = False
    try:
        with pytest.raises(DamagedStore, match="is not what was written"):
            explanations(run)
    finally:
        run.sealed = True
