"""Steering a latent: what changes, what does not, and what it costs; on random models and planted dictionaries."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import BEGIN, VOCAB, WIDTH, save_model, small_stages, token_recipe
from support.small_stores import write_activations
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.provenance import LanguageModelRows, Text
from sae.cache.runs import Run
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.places import intervene
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import create, parse
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary
from sae.pipeline.saes.inference import Formula, ReLURule
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.steering.doses import Dose, Nothing, unit_size
from sae.pipeline.steering.generating import continuation, log_chances
from sae.pipeline.steering.opened import Opened
from sae.pipeline.steering.stage import kl, steer
from sae.pipeline.steering.topics import ablate_topic

M = 12
PROMPT = "t5 t9 t30 t7 t22"


class Words:
    """A tokenizer of words as `t12`, each the token of its number."""

    slug, n_vocab, begin, has_begin, end = "words", VOCAB, BEGIN, True, 4
    special = frozenset({BEGIN})

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word[1:]) for word in text.split()], np.uint32) for text in texts]

    def vocabulary(self) -> list[bytes]:
        return [b"t%d " % i for i in range(VOCAB)]

    def recipe(self) -> dict[str, Any]:
        return {"name": self.slug, "digest": "0"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LanguageModel]]:
    root = tmp_path_factory.mktemp("models")
    with small_stages():
        yield {kind: LanguageModel.boot(str(save_model(kind, root / kind))) for kind in ("llama", "gpt2", "mistral")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, models: dict[str, LanguageModel]) -> Dataset:
    rows = 1 + torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    return Dataset.of(write_activations(tmp_path_factory.mktemp("cache"), rows, "float32", ended=True))


def topk(**settings: Any) -> Dictionary:
    made = create(parse({"arch": "topk", "k": 3, "d_sae": M, "decoder_norm": "free", **settings}), WIDTH, seed=3)
    made.initialise(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) + 1)
    return made.fold().eval().requires_grad_(False)


def planted(directions: Tensor, threshold: float = 0.0) -> FixedDictionary:
    """A ReLU dictionary with these directions [m, d], of which each fires above a threshold."""
    m, d = directions.shape
    bias = torch.full((m,), -threshold)
    made = Formula(directions.T.contiguous(), bias, directions, torch.zeros(d), ReLURule(), centred=False)
    return FixedDictionary(made).requires_grad_(False)


def place(
    model: LanguageModel, dataset: Dataset, point: Point, dictionary: Dictionary, writes: Point | None = None
) -> Opened:
    rows = LanguageModelRows(
        model.name, *point, model.hook(point), Text.of(token_recipe()), {"skip_first": 1, "skip_begin": True}
    )
    run = object.__new__(Run)
    run.path = Path("looked-at")
    return Opened(run, dictionary, model, Words(), dataset, point, writes or point, rows)


def dose(opened: Opened, feature: int, strength: float, prompt: int = 6, **settings: Any) -> Dose:
    config = SteerConfig(**settings)
    return Dose(opened, config, feature, strength, unit_size(opened, config, feature, Silent()), prompt)


def busiest(opened: Opened, ids: Tensor) -> int:
    return int(opened.attached.latents(ids[None]).dense()[0, 1:].sum(0).argmax())


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"])
def test_a_strength_of_0_changes_nothing_to_the_last_bit(
    models: dict[str, LanguageModel], dataset: Dataset, site: str
) -> None:
    opened = place(models["llama"], dataset, Point(1, site), topk())
    ids = opened.encoded(PROMPT, "prompt")
    feature = busiest(opened, ids)
    clean = log_chances(opened.model, Nothing(), ids, 0)
    written = continuation(opened.model, Nothing(), ids, 2)
    for unit in ("norm", "raw"):
        nothing = dose(opened, feature, 0.0, unit=unit)
        assert torch.equal(log_chances(opened.model, nothing, ids, 0), clean)
        assert torch.equal(continuation(opened.model, nothing, ids, 2), written)
        assert not torch.equal(log_chances(opened.model, dose(opened, feature, 3.0, unit=unit), ids, 0), clean)
    found = steer(opened, feature, PROMPT, [0.0], Silent(), config=SteerConfig(length=2))
    assert found.doses[0].outcome == found.baseline
    assert found.doses[0].kl == 0 and found.doses[0].kl_continuation == 0


def test_a_latent_clamped_to_what_it_is_changes_nothing(models: dict[str, LanguageModel], dataset: Dataset) -> None:
    opened = place(models["llama"], dataset, Point(0, "mlp_out"), topk())
    ids = opened.encoded(PROMPT, "prompt")
    feature = busiest(opened, ids)
    values = opened.attached.latents(ids[None]).dense()[0, :, feature]
    where = int(values[1:].argmax()) + 1
    clean = log_chances(opened.model, Nothing(), ids, 0)
    for to, changes in ((values[where].item(), False), (values[where].item() + 5, True)):
        clamped = dose(opened, feature, to, mode="clamp", unit="raw", positions=(where,))
        found = log_chances(opened.model, clamped, ids, 0)
        assert torch.equal(found, clean) is not changes
        assert torch.equal(found[:where], clean[:where]), "what comes before is as it was"


@pytest.mark.parametrize("settings", [{}, {"input_scale": "per_token"}])
def test_what_is_done_to_a_latent_is_done_to_its_direction(
    models: dict[str, LanguageModel], dataset: Dataset, settings: dict[str, Any]
) -> None:
    """By hand: ablating takes f_i w_i away, clamping adds (c - f_i) w_i, adding adds it, where the text became rows."""
    coder = topk(**settings)
    opened = place(models["gpt2"], dataset, Point(1, "resid_post"), coder)
    ids = opened.encoded(PROMPT, "prompt")
    feature = busiest(opened, ids)
    largest = unit_size(opened, SteerConfig(), feature, Silent())
    norm = unit_size(opened, SteerConfig(unit="norm"), feature, Silent())
    rows = dataset.sample(200, batch=50).x
    assert largest == pytest.approx(coder.encode(rows).dense()[:, feature].max().item())
    assert norm == pytest.approx(rows.norm(dim=1).mean().item())
    w = coder.W_dec[feature]

    def by_hand(change: Any) -> Tensor:
        def put(value: Tensor) -> Tensor:
            latents = coder.encode(value)
            f = latents.dense()[..., feature, None]
            frame = torch.ones(()) if latents.row_stats is None else latents.row_stats.std.view(f.shape)
            added = change(f, frame)
            added[:, 0] = 0  # the begin token never became a row
            return value + added

        with intervene(opened.model, {opened.writes: put}):
            return opened.model.predictions(ids)

    cases = [
        (dose(opened, feature, 0.0, mode="ablate"), lambda f, frame: -f * frame * w),
        (dose(opened, feature, 2.0, mode="clamp"), lambda f, frame: (2 * largest - f) * frame * w),
        (dose(opened, feature, -0.5), lambda f, frame: torch.ones_like(f) * -0.5 * largest * frame * w),
        (dose(opened, feature, 2.0, unit="norm"), lambda f, frame: torch.ones_like(f) * 2 * norm * w / w.norm()),
    ]
    for steered, change in cases:
        with steered.at(ids):
            found = opened.model.predictions(ids)
        torch.testing.assert_close(found, by_hand(change), rtol=1e-4, atol=1e-4)


def test_a_token_that_a_direction_points_to_becomes_likelier_with_the_strength(
    models: dict[str, LanguageModel], dataset: Dataset
) -> None:
    model = models["llama"]
    unembedding = model.matrices["lm_head"].weight if "lm_head" in model.matrices else None
    assert unembedding is not None
    directions = torch.nn.functional.normalize(unembedding[:M].float(), dim=1)
    opened = place(model, dataset, Point(1, "resid_post"), planted(directions))
    ids = opened.encoded(PROMPT, "prompt")
    for feature in (5, 9):
        top = int((directions[feature] @ unembedding.float().T).argmax())
        token = opened.text([top])
        strengths = [0.0, 0.01, 0.05, 0.2]
        found = steer(
            opened, feature, PROMPT, strengths, Silent(), target=token, config=SteerConfig(unit="norm", length=0)
        )
        gained = [one.target_change for one in found.doses]
        assert gained[0] == 0 and all(a < b for a, b in pairwise(gained)), gained  # type: ignore[operator]
        divergences = [one.kl for one in found.doses]
        assert divergences == sorted(divergences) and divergences[-1] > 0
    assert len(ids) == 6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_what_is_kept_of_earlier_tokens_changes_no_continuation(
    models: dict[str, LanguageModel], dataset: Dataset, kind: str
) -> None:
    """At any positions: a position is changed for good, whether it is computed once or for every token anew."""
    opened = place(models[kind], dataset, Point(0, "resid_post"), topk())
    ids = opened.encoded(PROMPT, "prompt")
    feature, seen = busiest(opened, ids), set()
    for positions in ("all", (2, 7)):
        steered = dose(opened, feature, 6.0, positions=positions)
        fast, slow = (continuation(opened.model, steered, ids, 5, keeping=keeping) for keeping in (True, False))
        assert torch.equal(fast, slow)
        seen.add(tuple(fast.tolist()))
        whole = torch.cat([ids, fast])
        chances = log_chances(opened.model, steered, whole[:-1], len(ids) - 1)
        assert chances.argmax(1).tolist() == fast.tolist(), "as the whole text read at once has it"
    assert len(seen) > 1


def test_what_is_drawn_is_decided_by_the_seed(models: dict[str, LanguageModel], dataset: Dataset) -> None:
    opened = place(models["llama"], dataset, Point(0, "resid_post"), topk())
    ids = opened.encoded(PROMPT, "prompt")
    drawn = [continuation(opened.model, Nothing(), ids, 8, temperature=2.0, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = continuation(opened.model, Nothing(), ids, 8, temperature=1e-6, seed=5)
    assert torch.equal(cold, continuation(opened.model, Nothing(), ids, 8))
    first = continuation(opened.model, Nothing(), ids, 8)
    assert continuation(opened.model, Nothing(), ids, 8, ends=frozenset({int(first[2])})).tolist() == first[:2].tolist()


def test_what_a_dose_costs_is_what_the_model_itself_says(models: dict[str, LanguageModel], dataset: Dataset) -> None:
    opened = place(models["llama"], dataset, Point(0, "resid_post"), topk())
    ids = opened.encoded(PROMPT, "prompt")
    feature = busiest(opened, ids)
    found = steer(opened, feature, PROMPT, [1.0, 4.0], Silent(), target="t8 ", config=SteerConfig(length=5))
    told = found.as_json()
    assert told["steered"] == told["doses"][-1] and told["kl"] == told["doses"][-1]["kl"] > 0
    assert told["unit"]["name"] == "max" and told["prompt_tokens"] == ids.tolist()
    for one in found.doses:
        steered = dose(opened, feature, one.strength)
        p, q = (log_chances(opened.model, treatment, ids, len(ids) - 1)[0] for treatment in (Nothing(), steered))
        assert one.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)
        assert one.outcome.target == pytest.approx(q[8].item()) and found.baseline.target == pytest.approx(p[8].item())
        assert [entry["id"] for entry in one.outcome.next] == q.topk(10).indices.tolist()
        whole = torch.cat([ids, torch.tensor(one.outcome.tokens)])
        losses = opened.model.losses(whole[None])[0, len(ids) - 1 :]
        assert one.outcome.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)
        assert one.outcome.text == "".join(f"t{i} " for i in one.outcome.tokens)
    assert float(kl(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, -math.inf]))) == 0


def test_a_transcoder_is_steered_where_it_writes(models: dict[str, LanguageModel], dataset: Dataset) -> None:
    made = create(parse({"arch": "topk", "k": 3, "d_sae": M}), WIDTH, WIDTH, seed=3)
    sample = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    made.initialise(sample, sample)
    coder = made.fold().eval().requires_grad_(False)
    opened = place(models["llama"], dataset, Point(1, "mlp_in"), coder, Point(1, "mlp_out"))
    ids = opened.encoded(PROMPT, "prompt")
    feature = busiest(opened, ids)
    clean = log_chances(opened.model, Nothing(), ids, 0)
    assert torch.equal(log_chances(opened.model, dose(opened, feature, 0.0, unit="raw"), ids, 0), clean)
    with dose(opened, feature, 3.0, unit="raw", positions=(2, 4)).at(ids):
        found = opened.model.predictions(ids)
    at = torch.zeros(1, len(ids), 1)
    at[:, [2, 4]] = 3.0
    with intervene(opened.model, {Point(1, "mlp_out"): lambda value: value + at * coder.W_dec[feature]}):
        torch.testing.assert_close(found, opened.model.predictions(ids), rtol=1e-4, atol=1e-4)


def test_zeroing_a_topics_latents_costs_the_topic_alone(
    models: dict[str, LanguageModel], dataset: Dataset, tmp_path: Path
) -> None:
    """Planted: latent 2 fires on token 17 alone, which the topic has and general text has not."""
    model = models["llama"]
    embedding = model.activations(torch.arange(VOCAB)[:, None], [Point(0, "resid_pre")])[Point(0, "resid_pre")][
        :, 0
    ].float()
    unit = torch.nn.functional.normalize(embedding - embedding.mean(0), dim=1)
    tokens = [11, 13, 17, 19, 23, 29]
    first, second = (unit[17] @ embedding.T).topk(2)[0].tolist()
    assert (unit[17] @ embedding.T).argmax() == 17
    threshold = (first + second) / 2
    opened = place(model, dataset, Point(0, "resid_pre"), planted(unit[tokens], threshold))
    random = np.random.default_rng(0)
    plain = [i for i in range(5, VOCAB) if i not in tokens]
    texts = {name: random.choice([*plain, *extra], 900) for name, extra in (("topic", [17] * 20), ("general", []))}
    for name, ids in texts.items():
        (tmp_path / name).write_text(" ".join(f"t{i}" for i in ids))
    config = SteerConfig(top=(1,), context=16, contexts=32)
    found = ablate_topic(opened, tmp_path / "topic", tmp_path / "general", Silent(), config=config)
    assert found["latents"][0] == {"feature": 2, "auroc": 1.0}
    (row,) = found["ablations"]
    assert abs(row["topic"]) > 1e-3 and row["general"] == 0 and row["selectivity"] is None
    again = ablate_topic(opened, tmp_path / "topic", tmp_path / "general", Silent(), config=config)
    assert again == found
    with pytest.raises(
        SaeError, match=r"^topic = general: no latent of .* fires more on it than on general; give another"
    ):
        ablate_topic(opened, tmp_path / "general", tmp_path / "general", Silent(), config=config)
    with pytest.raises(
        SaeError, match=r"top = 7: only [0-9]+ latents .* fire more on topic than on general; give fewer"
    ):
        ablate_topic(
            opened, tmp_path / "topic", tmp_path / "general", Silent(), config=config.model_copy(update={"top": (7,)})
        )
    (tmp_path / "short").write_text("t5 t6")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    wrong = {
        "short": "is 0 contexts of 16 tokens, and 4 are the least", "bytes": "is not UTF-8", "none": "cannot be read",
        ".": "is no file",
    }  # fmt: skip
    for name, says in wrong.items():
        with pytest.raises(SaeError, match=f"^general = .*: {says}"):
            ablate_topic(opened, tmp_path / "topic", tmp_path / name, Silent(), config=config)


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({"feature": M}, {}, f"feature = {M}: looked-at has latents 0 to {M - 1}"),
        ({"feature": -1}, {}, f"feature = -1: looked-at has latents 0 to {M - 1}"),
        ({"prompt": ""}, {}, r"prompt = \.\.\.: is empty"),
        ({"prompt": "t5 " * 40}, {}, r"prompt = \.\.\.: is 41 tokens; gpt2 reads at most 32"),
        ({}, {"length": 30}, r"length = 30: with the prompt: is 36 tokens; gpt2 reads at most 32"),
        ({"strengths": [math.nan]}, {}, "strength = nan: is not a finite number"),
        ({"strengths": [math.inf]}, {}, "strength = inf: is not a finite number"),
        ({"strengths": []}, {}, r"strength = \.\.\.: how much is not said"),
        ({"strengths": [1.0, 1.0]}, {}, "strength = 1: is there twice"),
        (
            {"strengths": [1e29]},
            {"unit": "raw"},
            r"strength = \.\.\.: under it the model's logits are no numbers any more",
        ),
        ({}, {"mode": "ablate"}, "strength = 2: `mode = ablate` takes none"),
        ({}, {"mode": "clamp", "unit": "norm"}, "unit = norm: is of what is added"),
        ({}, {"positions": (50,)}, "positions = 50: the prompt and what is generated have positions 0 to 8"),
        ({"target": "nothing"}, {}, "target = 'nothing': is"),
        ({"feature": 0, "dead": True}, {}, "feature = 0: fires in none of the first 200 rows"),
    ],
)
def test_what_cannot_be_steered_is_said(
    models: dict[str, LanguageModel], dataset: Dataset, changes: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    given = {"feature": 1, "prompt": PROMPT, "strengths": [2.0], "target": None, "dead": False, **changes}
    coder = planted(torch.eye(M, WIDTH), 1e6) if given["dead"] else topk()
    opened = place(models["gpt2"], dataset, Point(0, "resid_post"), coder)
    if given["target"] is not None:
        opened.tokenizer.encode_batch = lambda texts: [np.array([5, 6, 7])]  # type: ignore[method-assign]
    with pytest.raises(SaeError, match=f"^{says}"):
        steer(
            opened, given["feature"], given["prompt"], given["strengths"], Silent(), target=given["target"],
            config=SteerConfig(**{"length": 3, **settings}),
        )  # fmt: skip
