"""The update by kernels against torch's own: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.saes_kit import D, batches, one_thread, small
from support.watching import watched
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from sae.pipeline import saes
from sae.pipeline.saes import Clock, Trainable, kernels
from sae.pipeline.saes.kernels import update
from sae.pipeline.train import optimising

single = pytest.fixture(autouse=True, scope="module")(one_thread)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's; conftest.py asks for it
BETAS, EPS = (0.8, 0.99), 1e-6


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)


def made(case: dict[str, Any], d_out: int | None = None) -> Trainable:
    both = (5, 7) if case["arch"] == "clt" else None
    it = saes.trainable(small(case, d_sae=12), both or D, both or d_out).to(DEVICE)
    it.initialise(*rows(it))
    return it


def rows(it: Trainable) -> tuple[Tensor, Tensor | None]:
    x, y = next(batches(None if it.d_out == D and it.config.arch != "clt" else it.d_out, 1))
    return x[:8].to(DEVICE), y if y is None else y[:8].to(DEVICE)


def adam(it: Trainable) -> torch.optim.Adam:
    return optimising.adam(it, 1e-3, 100, BETAS, EPS)


def steps(it: Trainable, optimiser: torch.optim.Adam, way: kernels.Way, clip: float | None, which: range) -> None:
    """Some steps, whose gradients come the plain way: rates of the two sides differ, and change from step to step."""
    x, y = rows(it)
    for step in which:
        with kernels.chosen("plain"):
            optimiser.zero_grad()
            it.loss(x, y, Clock(step, 100, 8)).total.backward()
        optimising.set_rates(optimiser, 1e-2 / (step + 1), 3e-2 * step)
        with kernels.chosen(way):
            optimising.take_step(it, optimiser, clip)


def assert_alike(one: Trainable, its: torch.optim.Adam, other: Trainable, others: torch.optim.Adam) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=1e-6, rtol=1e-5)
    assert its.state_dict()["state"].keys() == others.state_dict()["state"].keys()
    torch.testing.assert_close(its.state_dict()["state"], others.state_dict()["state"], atol=1e-6, rtol=1e-5)


def spelled(case: dict[str, Any]) -> dict[str, Any]:
    return {"k": 3, **case} if case["arch"].startswith("vsae") else case


ONE: Any = ({"arch": "jumprelu", "theta_init": 1e-3, "decoder_norm": "free"}, 7, None)
CASES: list[Any] = [
    *(({"arch": tag}, None, 0.1) for tag in saes.ARCHITECTURES if tag not in ("topk", "matryoshka", "clt", "molt")),
    ({"arch": "matryoshka", "prefixes": (4, 8)}, None, None),
    ({"arch": "topk", "b_dec_init": "none", "encoder_bias": False, "pre_encoder_bias": False}, 7, 1e9),
    ({"arch": "clt", "k": 3}, None, 0.1),
    ({"arch": "clt", "sparsity": "jumprelu"}, None, None),
    ({"arch": "vae"}, 7, None),
]


@pytest.mark.parametrize(
    ("case", "d_out", "clip"), [ONE, *(pytest.param(*one, marks=pytest.mark.slow) for one in CASES)], ids=str
)
def test_steps_are_those_of_the_plain_way(case: dict[str, Any], d_out: int | None, clip: float | None) -> None:
    it = made(spelled(case), d_out)
    plain = copy.deepcopy(it)
    optimiser, theirs = adam(it), adam(plain)
    steps(it, optimiser, "auto", clip, range(2))
    steps(plain, theirs, "plain", clip, range(2))
    assert_alike(it, optimiser, plain, theirs)


def test_a_run_goes_on_the_other_way_than_it_began_and_two_equal_ones_end_alike() -> None:
    """From what the optimiser's state says, which is all that a checkpoint has."""
    start = made({"arch": "topk"})
    plain = copy.deepcopy(start)
    theirs = adam(plain)
    steps(plain, theirs, "plain", 0.1, range(2))
    ended = []
    ways: list[tuple[kernels.Way, kernels.Way]] = [
        ("auto", "auto"),
        ("auto", "auto"),
        ("auto", "plain"),
        ("plain", "auto"),
    ]
    for before, after in ways:
        it = copy.deepcopy(start)
        first, second = adam(it), adam(it)
        steps(it, first, before, 0.1, range(1))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        steps(it, second, after, 0.1, range(1, 2))
        assert_alike(it, second, plain, theirs)
        ended.append(it.state_dict())
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


def test_rows_longer_than_are_held_at_once_and_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # compiled kernels have these numbers in them
        for name, value in {"COLUMNS": 8, "MOST_COLUMNS": 8, "PARTS": 16}.items():
            monkeypatch.setattr(update, name, value)
    monkeypatch.setattr(update, "TOGETHER", 2)
    it = made({"arch": "topk"})
    plain = copy.deepcopy(it)
    optimiser, theirs = adam(it), adam(plain)
    steps(it, optimiser, "auto", 0.1, range(2))
    steps(plain, theirs, "plain", 0.1, range(2))
    assert_alike(it, optimiser, plain, theirs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which interprets
@pytest.mark.parametrize(("wrong", "clip"), [(torch.nan, 1.0), (torch.nan, None), (torch.inf, 1.0), (0.0, 1.0)])
def test_gradients_that_are_no_numbers_and_none(wrong: float, clip: float | None) -> None:
    it = made({"arch": "jumprelu"})
    found = []
    for way in ("auto", "plain"):
        one = copy.deepcopy(it)
        for parameter in one.parameters():
            parameter.grad = torch.full_like(parameter, 0.0 if wrong == 0 else 0.01)
        one.get_parameter("b_enc").grad[2] = wrong  # type: ignore[index]
        one.get_parameter("b_dec").grad = None
        optimiser = adam(one)
        with kernels.chosen("auto" if way == "auto" else "plain"):
            optimising.take_step(one, optimiser, clip)
        found.append((one.state_dict(), optimiser.state_dict()["state"]))
    assert len(found[0][1]) == len(dict(it.named_parameters())) - 1
    torch.testing.assert_close(*found, equal_nan=True, atol=1e-6, rtol=1e-5)


Launch = tuple[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The kernels that were launched, with all that decides whether one is compiled anew."""
    seen: list[Launch] = []
    launch: Callable[..., None] = kernels.launch

    def kind(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(kind, given))
        return given if isinstance(given, int) else type(given)

    def watching(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        seen.append((kernel.fn.__name__, (tuple(map(kind, args)), constants)))
        with _disable_current_modes():  # the interpreter's own operations are no device's
            launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(update, "launch", watching)
    return seen


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_is_two_or_three_launches_that_nothing_waits_for_and_no_rate_compiles(
    launches: list[Launch], clip: float | None
) -> None:
    it = made({"arch": "topk"})
    optimiser = adam(it)
    for one in it.parameters():
        one.grad = torch.ones_like(one)
    each = []
    for rate in (1.0, 1e-3):
        optimising.set_rates(optimiser, rate, 2 * rate)
        launches.clear()
        found = watched(lambda: optimising.take_step(it, optimiser, clip), DEVICE)
        each.append([*launches])
    assert not found.waited and not found.launched
    assert [name for name, _ in each[0]] == [*(["_squares"] if clip else []), "_prepare", "_update"]
    assert each[0] == each[1]


def test_what_groups_do_not_say_all_of_is_left_to_torch(launches: list[Launch]) -> None:
    """As where architectures have a `before_step` or `after_step` of their own, and where numbers lie otherwise."""
    others = {tag for tag in saes.ARCHITECTURES if tag != "clt" and not made(spelled(tiny(tag))).kept_by_groups}
    assert others == {"molt", "nvae"}
    for it in (made({"arch": "molt"}), nn_of(made({"arch": "topk"}))):
        steps(it, adam(it), "auto", 1.0, range(1))
    assert not launches


def tiny(tag: str) -> dict[str, Any]:
    return {"arch": tag} | ({"prefixes": (4, 8)} if tag == "matryoshka" else {})


def nn_of(it: Trainable) -> Trainable:
    """The same, one of its matrices kept column after column."""
    it.register_parameter("W_dec", nn.Parameter(it.get_parameter("W_dec").detach().T.contiguous().T))
    return it
