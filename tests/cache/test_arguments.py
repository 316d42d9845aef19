"""Arguments of the wrong kind are named in a line; those of the right one reach the function as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import pytest
import torch

from sae.cache.arguments import checked
from sae.cache.errors import SaeError


class More(TypedDict, total=False):
    seed: int


class Kept:
    @checked
    def kept(
        self, number: int, share: float = 0.5, on: bool = True, name: str | Path | None = None,
        items: Sequence[int | str] | str = (), *every: str, way: Literal["up", "down"] = "up", anything: Any = None,
        **more: Unpack[More],
    ) -> dict[str, Any]:  # fmt: skip
        """As it was given."""
        return {name: value for name, value in locals().items() if name != "self"}


@pytest.mark.parametrize(
    "given",
    [
        {}, {"share": 1}, {"share": np.float64(1)}, {"on": False}, {"items": (1, "b")},
        {"name": "a"}, {"name": Path("a")}, {"items": "ab"}, {"items": [1, "b"]}, {"items": np.arange(3)},
        {"items": torch.arange(3)}, {"items": {1: 2}.keys()}, {"way": "down"}, {"anything": object()}, {"seed": 3},
    ],
)  # fmt: skip
def test_what_fits_reaches_the_function_as_it_is(given: dict[str, Any]) -> None:
    found = Kept().kept(**{"number": 1, **given})
    assert all({**found, **found["more"]}[name] is value for name, value in given.items())


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"number": np.int64(3)}, 3), ({"number": np.uint8(3)}, 3), ({"number": np.array(3)}, 3),
        ({"number": torch.tensor(3)}, 3), ({"share": np.float32(0.25)}, 0.25), ({"share": torch.tensor(0.25)}, 0.25),
        ({"share": np.int64(2)}, 2.0), ({"on": np.False_}, False), ({"seed": np.int32(3)}, 3),
    ],
)  # fmt: skip
def test_numbers_of_numpy_and_torch_reach_it_as_those_of_python(given: dict[str, Any], plain: float) -> None:
    found = Kept().kept(**{"number": 1, **given})
    [one] = [{**found, **found["more"]}[name] for name in given]
    assert one == plain and type(one) is type(plain)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"number": 1.5}, "number = 1.5: is not what is meant; give a whole number"),
        ({"number": True}, "number = True: is not what is meant; give a whole number"),
        ({"number": torch.zeros(2)}, "number: is a Tensor; give a whole number"),
        ({"share": "half"}, "share = 'half': is not what is meant; give a number"),
        ({"share": "x" * 99}, f"share = '{'x' * 36}...: is not what is meant; give a number"),
        ({"on": "no"}, "on = 'no': is not what is meant; give True or False"),
        ({"on": 1}, "on = 1: is not what is meant; give True or False"),
        ({"name": 3}, "name = 3: is not what is meant; give text or an object of Path or None"),
        ({"items": 3}, "items = 3: is not what is meant; give a list (of a whole number or text) or text"),
        ({"items": [1, None]}, "items: holds a NoneType; give a list (of a whole number or text) or text"),
        ({"items": {1: 2}}, "items: is a dict; give a list (of a whole number or text) or text"),
        ({"items": iter([1])}, "items: is a list_iterator; give a list (of a whole number or text) or text"),
        ({"items": np.array(3.5)}, "items: is a ndarray; give a list (of a whole number or text) or text"),
        ({"way": "left"}, "way = 'left': is not what is meant; give 'up' or 'down'"),
        ({"seed": "a"}, "seed = 'a': is not what is meant; give a whole number"),
    ],
)
def test_what_does_not_is_named(given: dict[str, Any], line: str) -> None:
    with pytest.raises(SaeError) as refused:
        Kept().kept(**{"number": 1, **given})
    assert str(refused.value) == line


def test_one_of_many_and_what_is_no_argument() -> None:
    assert Kept().kept(1, 0.5, True, None, (), "a", "b")["every"] == ("a", "b")
    with pytest.raises(SaeError, match=r"^every = 3: is not"):
        Kept().kept(1, 0.5, True, None, (), "a", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Kept\.kept\(\) missing 1 required positional argument: 'number'"):
        Kept().kept()  # type: ignore[call-arg]
    assert Kept.kept.__doc__ == "As it was given." and Kept.kept.__name__ == "kept"
