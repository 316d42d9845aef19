"""A process killed at a chosen change on the disk, without a process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it."""


@contextmanager
def killed_at(step: int, *calls: str) -> Iterator[list[bool]]:
    """Raise Killed in the place of the call of `os` after so many, and end there; a list, filled where it came to that.

    From then on no such call does anything: what a dead process would not do is not done by what cleans up after it.
    """
    left = step
    came: list[bool] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*args, **options)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            yield came
        except Killed:
            came.append(True)


def killed_after(renames: int) -> Any:
    """`killed_at` for the calls that put a file in its place."""
    return killed_at(renames, "replace")
