"""Kernels against their plain twins: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, D, batches, one_thread, small
from support.watching import watched
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

import triton

from sae.pipeline import saes
from sae.pipeline.saes import Clock, encoder, kernels, placement, sparse, stacks
from sae.pipeline.saes.kernels import products, rows, select
from sae.pipeline.saes.latents import Latents

single = pytest.fixture(autouse=True, scope="module")(one_thread)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's; conftest.py asks for it


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small rows take several chunks, and every kernel more than one turn."""
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    if DEVICE == "cpu":
        monkeypatch.setattr(select, "CHUNK", 32)
        monkeypatch.setattr(select, "PROGRAMS", 3)
        monkeypatch.setattr(select, "TOGETHER", 2)
        monkeypatch.setattr(products, "ENTRIES", 4)
        monkeypatch.setattr(products, "COLUMNS", 16)
        monkeypatch.setattr(rows, "COLUMNS", 16)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ties(b: int, m: int, levels: int) -> Tensor:
    return ((made(b, m) * levels).round() / levels) + 0.0


ROWS = {
    "few": (made(3, 5), 2),
    "all": (made(3, 9), 9),
    "one": (made(2, 70), 1),
    "long": (made(3, 70), 5),
    "ties": (ties(2, 40, 2), 4),
    "equal": (torch.ones(2, 20, device=DEVICE), 3),
    "more equal than there is room for": (ties(1, 60, 1).clamp_max(0), 3),
    "zeros of both signs": (torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0, -2.0]], device=DEVICE), 4),
    "infinite": (torch.tensor([[-torch.inf, 1.0, torch.inf, -3.0]], device=DEVICE), 3),
}
KINDS = [torch.float32, torch.bfloat16]
CHOICES = [
    pytest.param(name, dtype, marks=[] if dtype == torch.float32 or name == "ties" else pytest.mark.slow)
    for name in ROWS
    for dtype in KINDS
]


def first_largest(flat: Tensor, count: int) -> list[int]:
    """Places of the largest, of equal ones the first, ascending."""
    order = (-flat.float()).cpu().argsort(stable=True)
    return sorted(order[:count].tolist())


@pytest.mark.parametrize(("name", "dtype"), CHOICES, ids=str)
def test_the_largest_of_a_row(name: str, dtype: torch.dtype) -> None:
    p, k = ROWS[name][0].to(dtype), ROWS[name][1]
    found = select.rows(p, k)
    assert found.tolist() == [first_largest(row, k) for row in p]


@pytest.mark.parametrize(("name", "dtype"), CHOICES, ids=str)
def test_the_largest_of_a_batch(name: str, dtype: torch.dtype) -> None:
    p = ROWS[name][0].to(dtype)
    if name == "long":
        p = p * torch.tensor([[1.0], [0.1], [30.0]], device=DEVICE, dtype=dtype)  # one row has nearly all of them
    count = min(p.numel(), len(p) * ROWS[name][1])
    assert select.batch(p, count).tolist() == first_largest(p.reshape(-1), count)


def test_the_largest_of_more_rows_than_are_shared_among_at_once() -> None:
    p = ties(34, 2, 1)
    assert select.batch(p, 30).tolist() == first_largest(p.reshape(-1), 30)


def test_what_is_no_number_comes_first() -> None:
    p = made(2, 40)
    p[1, 7] = torch.nan
    assert 7 in select.rows(p, 2)[1].tolist() and 47 in select.batch(p, 3).tolist()
    assert 47 in select.batch(p.bfloat16(), 1).tolist()


@pytest.mark.parametrize("d", [1, 37])
def test_products(d: int) -> None:
    """Rows and latents without entries, one with more than are taken at a time."""
    b, m = 5, 7
    on = torch.rand(b, m, generator=torch.Generator().manual_seed(1)) < 0.4
    on[2], on[:, 3], on[[0, 1, 3, 4], 5] = False, False, True
    row_ids, indices = (one.to(DEVICE) for one in on.nonzero(as_tuple=True))
    starts = torch.searchsorted(row_ids, torch.arange(b, device=DEVICE))
    ordered, order = indices.sort(stable=True)
    latent_starts = torch.searchsorted(ordered, torch.arange(m, device=DEVICE))
    weights, table, batch = made(len(indices)), made(m, d, seed=1), made(b, d, seed=2)
    dense = torch.zeros(b, m, device=DEVICE).index_put((row_ids, indices), weights)
    close = torch.testing.assert_close
    close(products.mixed(starts, indices, weights, table), dense @ table)
    close(products.dots(starts, indices, batch, table), (batch @ table.T)[row_ids, indices])
    gradient, totals = products.by_latent(latent_starts, order, row_ids, weights, batch)
    close(gradient, dense.T @ batch)
    close(totals, dense.sum(0))
    for rest in (made(1, d, seed=3), made(b, d, seed=3)):
        y_hat, error, squares, dots = products.compared(starts, indices, weights, table, rest, batch)
        wanted = dense @ table + rest
        close(y_hat, wanted)
        close(error, wanted - batch)
        close(squares, (wanted - batch).square().sum(1))
        close(dots, ((wanted - batch) @ table.T)[row_ids, indices], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("d", [3, 40])
def test_rows(d: int) -> None:
    table, grad = torch.nn.functional.normalize(made(5, d), dim=1), made(5, d, seed=1)
    wanted = grad - (grad * table).sum(1, keepdim=True) * table
    rows.tangent_(grad, table)
    torch.testing.assert_close(grad, wanted)
    stretched = 3 * table
    rows.unit_(stretched)
    torch.testing.assert_close(stretched, table)


FEW: list[dict[str, Any]] = [{"arch": "topk"}, {"arch": "l1"}]
TRAINED: list[dict[str, Any]] = [{"arch": tag} for tag in DICTIONARIES if tag not in ("topk", "l1", "matryoshka")] + [
    {"arch": "matryoshka", "prefixes": (4, 8)},
    {"arch": "vsae_iso", "k": 4},
    {"arch": "clt", "k": 3},
    {"arch": "clt", "sparsity": "batchtopk", "k": 3},
    {"arch": "topk", "input_scale": "per_token", "reduction": "fvu"},
    {"arch": "molt"},
]


@pytest.mark.parametrize("case", [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in TRAINED)], ids=str)
def test_two_steps_are_those_of_the_plain_way(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "HOSTS", set())
    both = (5, 7) if case["arch"] == "clt" else None
    x, y = (None if one is None else one[:4].to(DEVICE) for one in next(batches(D if both else None, 1)))
    it = saes.trainable(small(case, d_sae=12), both or D, both).to(DEVICE)
    assert x is not None
    it.initialise(x, y)
    other = copy.deepcopy(it)
    for one, way in ((it, "auto"), (other, "plain")):
        optimiser = torch.optim.Adam(one.parameters(), lr=1e-3, fused=True)
        with kernels.chosen(way):
            for step in range(2):
                losses = one.loss(x, y, Clock(step, 100, 4))
                optimiser.zero_grad()
                losses.total.backward()
                one.before_step()
                optimiser.step()
                one.after_step()
                one.track(one.observe(losses))
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in (it, other)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(it.state_dict(), other.state_dict(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("ks", [(3, 3), pytest.param((3, 3, 2), marks=pytest.mark.slow)], ids=str)
def test_a_stack_is_each_dictionary_alone(ks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter to the bit; a card may add up in another order where there are more rows."""
    monkeypatch.setattr(placement, "HOSTS", set())
    tolerance = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    close = functools.partial(torch.testing.assert_close, **tolerance)
    x, clock = next(batches(None, 1))[0][:4].to(DEVICE), Clock(0, 100, 4)
    configs = [small({"arch": "topk", "k": k, "aux_k": 2}, d_sae=12) for k in ks]
    each = [saes.create(one, D, seed=seed).to(DEVICE) for seed, one in enumerate(configs)]
    for one in each:
        one.initialise(x)
        one.rows_since_fired[3:8] = 10**9
    alone = copy.deepcopy(each)
    stack = stacks.stacked(each)
    losses = stack.loss(x, clock=clock)
    losses.total.sum().backward()
    stack.track(stack.observe(losses))
    stacks.give_gradients(stack, each)
    for one, mine, part in zip(alone, each, stacks.split(losses, ks), strict=True):
        own = one.loss(x, clock=clock)
        own.total.backward()
        one.track(one.observe(own))
        close(part.terms, own.terms)
        close([part.x_hat, part.l0()], [own.x_hat, own.l0()])
        close(*({name: p.grad for name, p in its.named_parameters()} for its in (mine, one)))
        close(mine.state_dict(), one.state_dict())


def test_values_of_a_choice_in_bfloat16_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = made(5, 32), made(24, 32)
    pre = encoder.Preactivations(x, x.new_zeros(32), weight, x.new_zeros(24))
    monkeypatch.setattr(encoder, "_scratch_rows", lambda purpose, *shape: torch.empty(shape[:2], dtype=shape[2]))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = pre.topk(4)
    assert found.indices is not None and found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, (x @ weight.T).gather(1, found.indices))


def test_a_reconstruction_that_is_used_again_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where dictionaries are aligned by what they predict."""
    monkeypatch.setattr(placement, "HOSTS", set())
    found = []
    for way, rests in (("auto", (3,)), ("plain", (3,)), ("auto", (2, 3)), ("plain", (2, 3))):
        entries = sparse.SparsePattern.per_row(torch.tensor([[0, 2], [1, 3]], device=DEVICE), 4)
        leaves = [made(*shape, seed=i).requires_grad_() for i, shape in enumerate(((2, 2), (4, 3), rests, (2, 3)))]
        values, table, rest, aim = leaves
        with kernels.chosen("auto" if way == "auto" else "plain"):
            if way == "auto":
                y_hat, total = sparse.compare(values, entries, table, rest, aim)
            else:
                y_hat = sparse.decode(values, entries, table) + rest
                total = (y_hat - aim).square().sum()
            grads = torch.autograd.grad(3 * total, leaves, retain_graph=True)
            found.append([grads, torch.autograd.grad(y_hat.exp().sum() - total, leaves, retain_graph=True)])
            found[-1].append(torch.autograd.grad(y_hat.exp().sum(), leaves[:3]))
    torch.testing.assert_close(found[::2], found[1::2])


def test_they_are_chosen_by_the_device_and_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    assert kernels.usable(x) and not kernels.usable(x.double()) and not kernels.usable(x.bfloat16())
    with kernels.chosen("plain"):
        assert not kernels.usable(x)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not kernels.usable(x)


@pytest.mark.parametrize(
    ("card", "trouble", "said"),
    [
        ((9, 0), None, None),
        ((6, 1), None, "Triton has none for cards of compute capability 6.1"),
        ((8, 0), RuntimeError("Failed to find C compiler.\nMore"), "and libcuda (Failed to find C compiler.)"),
        ((8, 0), AssertionError("libcuda.so cannot found!"), "(libcuda.so cannot found!)"),
        ((8, 0), subprocess.CalledProcessError(1, ["gcc"]), "(Command '['gcc']' returned non-zero exit status 1.)"),
    ],
)
def test_what_keeps_them_from_a_card_is_said(
    card: tuple[int, int], trouble: Exception | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own operations take their place there."""

    class Driver:
        @property
        def active(self) -> Any:
            if trouble is not None:
                raise trouble
            return SimpleNamespace(get_current_target=lambda: None)

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    monkeypatch.setattr(kernels, "hindrance", functools.cache(kernels.hindrance.__wrapped__))
    there = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda:1"), dtype=torch.float32, is_contiguous=lambda: True
    )
    found = kernels.hindrance(there.device)
    assert found is None if said is None else found is not None and said in found
    assert kernels.usable(there) == (said is None)  # type: ignore[arg-type]


def test_sums_by_weights_that_learn_are_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of an L1 penalty by decoder norms on the k largest: many entries share a latent's weight."""

    def quiet(*args: Any, **constants: Any) -> None:
        with _disable_current_modes():  # the interpreter's own operations are no device's
            kernels.launch(*args, **constants)

    monkeypatch.setattr(products, "launch", quiet)
    values, indices = made(4, 2), torch.tensor([[0, 2], [2, 3], [2, 0], [1, 2]], device=DEVICE)
    found = []
    for hosts in (set[str](), {"cpu", "cuda"}):
        monkeypatch.setattr(placement, "HOSTS", hosts)
        weights = made(5, seed=1).requires_grad_()
        sums = Latents.of_rows(values, indices, 5).sum_per_row(weights)
        asked = watched(lambda sums=sums: sums.square().sum().backward(), DEVICE)  # type: ignore[misc]
        assert (asked.launched["index_add"] > 0) == bool(hosts)
        found.append((sums, weights.grad))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """Which needs none; what the interpreter takes, the compiler may not."""
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.compiling"]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[2], env=there | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "_mix", "_dots", "_compare", "_tangent", "_unit", "_maxima", "_candidates", "_keep", "_digits", "_narrow",
        "_count", "_emit", "_list", "_by_row", "_by_latent", "_squares", "_prepare", "_update",
        "_share", "_fired", "_follow", "_least", "_lead",
    }  # fmt: skip
