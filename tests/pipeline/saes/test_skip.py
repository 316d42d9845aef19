"""A transcoder's skip connection: the same dictionary of what the linear path leaves over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, SMALL, B, D, batches, made, one_thread, settings, train
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline import formats, saes
from sae.pipeline.formats import Metadata
from sae.pipeline.saes import SAE, Clock

single = pytest.fixture(autouse=True, scope="module")(one_thread)
OUT = 7


def twins(arch: str, **changes: Any) -> tuple[SAE, SAE]:
    """The same weights with and without a skip connection, which is not zero; some latents have been dead."""
    given = {"arch": arch, "dead_after": 5, **changes}
    without, with_skip = (made(settings(given | {"skip": skip}), OUT) for skip in (False, True))
    without.rows_since_fired[::3] = 10
    with_skip.load_state_dict(without.state_dict() | {"W_skip": 0.1 * torch.randn(D, OUT)})
    return without, with_skip


@pytest.mark.parametrize("arch", DICTIONARIES)
def test_it_is_the_loss_of_what_the_linear_path_leaves_over(arch: str) -> None:
    without, with_skip = twins(arch)
    x, y = next(batches(OUT, 1))
    W = with_skip.W_skip
    assert W is not None and y is not None
    path = W.detach().clone().requires_grad_()
    left = y - (x * without.scale) @ path / without.target_scale
    clock = Clock(3, 10, B)
    expected, losses = without.loss(x, left, clock), with_skip.loss(x, y, clock)
    for name, term in expected.terms.items():
        torch.testing.assert_close(losses.terms[name], term, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.x_hat, expected.x_hat + (y - left), rtol=1e-4, atol=1e-4)
    told = [name for name in expected.terms if name not in ("gate", "auxk")]  # whose targets are taken as given
    sum(expected.terms[name] for name in told).backward(retain_graph=True)  # type: ignore[union-attr]
    assert path.grad is not None
    by_path = path.grad.clone()
    without.zero_grad()
    expected.total.backward()
    losses.total.backward()
    torch.testing.assert_close(W.grad, by_path, rtol=1e-3, atol=1e-4)
    for name, parameter in without.named_parameters():
        torch.testing.assert_close(with_skip.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_it_starts_at_nothing() -> None:
    without, with_skip = (made(settings({"arch": "topk", "skip": skip}), OUT) for skip in (False, True))
    assert with_skip.W_skip is not None and not with_skip.W_skip.any()
    x, y = next(batches(OUT, 1))
    assert torch.equal(with_skip.loss(x, y).total, without.loss(x, y).total)
    assert with_skip.state_dict().keys() - without.state_dict().keys() == {"W_skip"}


@pytest.mark.parametrize("arch", DICTIONARIES)
def test_a_folded_one_is_the_function_that_was_trained(arch: str) -> None:
    sae = made(settings({"arch": arch, "skip": True}), OUT)
    train(sae, batches(OUT, 5), lr=1e-2)
    sae.eval()
    x = next(batches(OUT, 1))[0] + 0.5
    assert sae.W_skip is not None and sae.W_skip.any()
    again = type(sae).from_formula(sae.config, sae.formula()).eval()
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)
    latents = again.encode(x)
    torch.testing.assert_close(again.decode(latents.edited(latents.dense())), again(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="adds a part of each row itself"):
        again.decode(latents.dense())
    with pytest.raises(ValueError, match=r"a .* of these settings is"):
        type(sae).from_formula(sae.config.model_copy(update={"skip": False}), sae.formula())


@pytest.mark.parametrize(
    ("arch", "format", "says"),
    [
        ("l1", "saelens", None),
        ("jumprelu", "saelens", None),
        ("batchtopk", "saelens", None),
        ("topk", "saelens", "it has no topk transcoder"),
        ("topk", "sparsify", None),
        ("l1", "sparsify", "its latents are chosen by topk"),
        ("l1", "openmoss", "it has no skip connection"),
        ("l1", "dictionary_learning", "transcoder"),
    ],
)
def test_it_is_written_where_a_tool_has_words_for_it(arch: str, format: str, says: str | None, tmp_path: Path) -> None:
    sae = made(settings({"arch": arch, "skip": True}), D)
    train(sae, batches(D, 3), lr=1e-2)
    sae.eval()
    if says is not None:
        with pytest.raises(SaeError, match=says):
            formats.write(sae, Metadata(), tmp_path / "it", format)
        return
    formats.write(sae, Metadata(), tmp_path / "it", format)
    x = next(batches(D, 1))[0]
    torch.testing.assert_close(formats.read(tmp_path / "it").dictionary(x), sae(x), rtol=1e-4, atol=1e-4)


def test_a_planted_linear_path_is_found() -> None:
    random = torch.Generator().manual_seed(3)
    mixing = torch.randn(D, OUT, generator=random)
    config = settings({"arch": "topk", "k": 1, "skip": True})
    sae = saes.create(config, D, OUT)
    rows = [torch.randn(B, D, generator=random) for _ in range(300)]
    sae.initialise(torch.cat(rows), torch.cat(rows) @ mixing)
    train(sae, ((x, x @ mixing) for x in rows), lr=1e-2)
    x = torch.randn(256, D, generator=random)
    assert error(sae(x), x @ mixing) < 0.01
    without = saes.create(config.model_copy(update={"skip": False}), D, OUT)
    without.initialise(torch.cat(rows), torch.cat(rows) @ mixing)
    train(without, ((x, x @ mixing) for x in rows), lr=1e-2)
    assert error(without(x), x @ mixing) > 0.3


def error(y_hat: Tensor, y: Tensor) -> float:
    return ((y_hat - y).square().sum() / (y - y.mean(0)).square().sum()).item()


def test_new_directions_are_of_what_the_linear_path_leaves_over() -> None:
    without, with_skip = twins("topk")
    x, y = next(batches(OUT, 1))
    assert y is not None and with_skip.W_skip is not None
    left = y - (x * without.scale) @ with_skip.W_skip.detach() / without.target_scale
    for one, other in zip(with_skip.directions(x, y), without.directions(x, left), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_where_it_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"skip: true .* input_scale: per_token"):
        settings({"arch": "topk", "skip": True, "input_scale": "per_token"})
    with pytest.raises(ValueError, match="skip: true would give an autoencoder its own input; name a target"):
        saes.create(settings({"arch": "topk", "skip": True, **SMALL["topk"]}), D)
