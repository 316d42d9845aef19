"""Interventions: contexts that nest, several points, parts of a site, and what they leave behind."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.small_models import LAYERS, VOCAB, save_model
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.language_model import SITES, LanguageModel, Point
from sae.pipeline.language_model.interventions import Change, predicting

TOKENS = torch.arange(24).view(2, 12) * 7 % VOCAB
LAST = Point(LAYERS - 1, "resid_post")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_model(request.param, tmp_path_factory.mktemp("models") / request.param)
    return LanguageModel.boot(str(folder), device="cpu")


def final(model: LanguageModel, *changes: dict[Point, Change]) -> Tensor:
    """The last residual stream with every one of some interventions, the first outermost."""
    with ExitStack() as stack:
        for each in changes:
            stack.enter_context(model.intervene(each))
        return model.activations(TOKENS, [LAST])[LAST]


@pytest.mark.parametrize("site", SITES)
def test_an_identity_at_any_site_changes_nothing(model: LanguageModel, site: str) -> None:
    clean, losses = final(model), model.losses(TOKENS)
    for same in (lambda x: x, torch.clone, lambda x: None):
        everywhere: dict[Point, Change] = {Point(layer, site): same for layer in range(LAYERS)}
        assert torch.equal(final(model, everywhere), clean)
        with model.intervene(everywhere):
            assert torch.equal(model.losses(TOKENS), losses)


@pytest.mark.parametrize("site", SITES)
def test_activations_at_a_changed_point_are_what_goes_on(model: LanguageModel, site: str) -> None:
    point = Point(0, site)
    clean = model.activations(TOKENS, [point])[point].clone()
    with model.intervene({point: lambda x: x + 1}):
        assert torch.equal(model.activations(TOKENS, [point])[point], clean + 1)
    assert torch.equal(model.activations(TOKENS, [point])[point], clean)


def test_contexts_nest_the_inner_being_given_what_the_outer_left(model: LanguageModel) -> None:
    point = Point(0, "mlp_out")
    both = final(model, {point: lambda x: x + 1}, {point: lambda x: 2 * x})
    assert torch.equal(both, final(model, {point: lambda x: 2 * (x + 1)}))
    assert not torch.equal(both, final(model, {point: lambda x: 2 * x + 1}))


def test_several_points_are_changed_in_one_pass(model: LanguageModel) -> None:
    """The residual stream is a sum: with what the last layer adds set to nothing, it is what entered the layer."""
    entry, nothing = Point(LAYERS - 1, "resid_pre"), torch.zeros_like
    entered = model.activations(TOKENS, [entry])[entry]
    changes: dict[Point, Change] = {Point(LAYERS - 1, site): nothing for site in ("mlp_out", "attn_out")}
    assert torch.equal(final(model, changes), entered)
    assert torch.equal(final(model, *({point: change} for point, change in changes.items())), entered)


def test_part_of_a_site_may_be_changed(model: LanguageModel) -> None:
    """Half of the columns, and half of the positions: what comes before is untouched, and halves make a whole."""
    point = Point(0, "resid_post")
    width = model.width(point)

    def zeroed(*places: object) -> Change:
        def change(value: Tensor) -> Tensor:
            new = value.clone()
            new[places] = 0
            return new

        return change

    left, right = zeroed(..., slice(width // 2)), zeroed(..., slice(width // 2, None))
    assert torch.equal(final(model, {point: left}, {point: right}), final(model, {point: torch.zeros_like}))
    assert not torch.equal(final(model, {point: left}), final(model, {point: right}))
    late = final(model, {point: zeroed(slice(None), slice(6, None))})
    assert torch.equal(late[:, :6], final(model)[:, :6]) and not torch.equal(late[:, 6:], final(model)[:, 6:])


def test_compare_takes_what_is_around_it_for_clean(model: LanguageModel) -> None:
    """Whatever lies around it, at an earlier layer, at the same point, or across the layers that run only once."""
    inner = {Point(1, "mlp_out"): lambda x: 0.5 * x}
    outers: list[dict[Point, Change]] = [
        {Point(0, "resid_mid"): lambda x: x + 1},
        {Point(1, "resid_pre"): lambda x: x.mul_(2)},
        {Point(1, "mlp_out"): lambda x: x + 1},
        dict(predicting(lambda x, y: x + y[..., : x.shape[-1]], Point(0, "mlp_in"), Point(1, "attn_out"))),
    ]
    for outer in outers:
        with model.intervene(outer):
            around = model.losses(TOKENS)
            with model.intervene(inner):
                both = model.losses(TOKENS)
            found = model.compare(TOKENS, {"it": inner, "same": {Point(1, "mlp_out"): torch.clone}})
        assert torch.equal(found.clean, around) and not torch.equal(around, model.losses(TOKENS))
        assert torch.equal(found.spliced["it"].ce, both)
        assert torch.equal(found.spliced["same"].ce, around)


def test_interventions_at_different_layers_are_compared_in_one_call(model: LanguageModel) -> None:
    changes = {"early": {Point(0, "attn_z"): torch.zeros_like}, "late": {Point(1, "mlp_post"): torch.zeros_like}}
    found = model.compare(TOKENS, changes)
    assert torch.equal(found.clean, model.losses(TOKENS))
    for name, change in changes.items():
        with model.intervene(change):
            assert torch.equal(found.spliced[name].ce, model.losses(TOKENS))


def test_a_context_ends_with_its_errors_and_in_any_order(model: LanguageModel) -> None:
    clean = model.losses(TOKENS)
    with pytest.raises(ZeroDivisionError), model.intervene({LAST: lambda x: x / (1 // 0)}):
        model.losses(TOKENS)
    assert torch.equal(model.losses(TOKENS), clean)
    one, other = model.intervene({LAST: torch.zeros_like}), model.intervene({LAST: torch.zeros_like})
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not torch.equal(model.losses(TOKENS), clean)
    other.__exit__(None, None, None)
    assert torch.equal(model.losses(TOKENS), clean)


def test_sites_are_tried_out_untouched_by_what_is_around(tmp_path: Path) -> None:
    """Which sites a layer has is found out by passes of its own, when they are first asked for."""
    model = LanguageModel.boot(str(save_model("gpt2", tmp_path / "model")), device="cpu")
    with model.intervene({Point(0, "resid_post"): torch.zeros_like}):
        assert model.width(Point(1, "mlp_out")) == model.width(Point(0, "mlp_out"))


def test_points_that_are_not_there_are_refused(model: LanguageModel) -> None:
    for point, message in ((Point(LAYERS, "mlp_out"), "has layers 0 to 1"), (Point(0, "mlp_outt"), "the sites are")):
        with pytest.raises(SaeError, match=message), model.intervene({point: torch.clone}):
            pass
    with pytest.raises(SaeError, match=r"1\.mlp_in is computed after 0\.mlp_out"):
        final(model, dict(predicting(lambda x, _: x, Point(1, "mlp_in"), Point(0, "mlp_out"))))
