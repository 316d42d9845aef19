"""A process killed at a chosen change on the disk, without a process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it."""


@contextmanager
def killed_after(renames: int) -> Iterator[list[bool]]:
    """Raise Killed in the place of the rename after so many, and end there; a list, filled where it came to that."""
    replace, left = os.replace, renames
    came: list[bool] = []

    def counted(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        try:
            yield came
        except Killed:
            came.append(True)
