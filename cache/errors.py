"""The one error tree. Everything a user can cause is a `SaeError`; anything else is our bug.

SaeError            the input cannot be used: one line, what is wrong and what to try (exit code 2)
├── NotFound        a store, run or name that is not there
├── Busy            another living process holds the lock
└── DamagedStore    the bytes on disk are not the bytes that were committed (exit code 3)

A message names what the user can change as Python has it; the command line says it in its own words
(`pipeline/commands/voice.py`):

- A setting or an argument stands with its value at the beginning (`codec = int9: no such codec`), and in backticks
  later: by its name alone (`context`), after its section where it has no option (`tokenize.min_tokens`), or with a
  value (`harvest.dtype = bfloat16`). The value of what is only switched on is True, that of what is long is ...
- What to do is a call in backticks: `harvest()`, `verify(KEY, repair=True)`; `choices()` is what `sae list` shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SaeError(ValueError):
    """The user's input cannot be used. The message is one line: the value, what is wrong, what to try."""

    exit_code = 2


class NotFound(SaeError):
    """Nothing on disk answers to the name that was given."""


class Busy(SaeError):
    """A living process holds the lock of the store that was asked for."""


class DamagedStore(SaeError):
    """Bytes on disk are missing or are not the bytes that were committed."""

    exit_code = 3


@contextmanager
def needing(what: str, extra: str, of: str = "sae-cache") -> Iterator[None]:
    """Import within what an extra of ours brings (pyproject.toml lists them); raise SaeError where that is not there.

    what: who needs it, as a message begins: the setting with its value, or the file. of: whose extra it is.
    """
    try:
        yield
    except ImportError as error:
        absent = [one.name for one in (error, error.__cause__) if isinstance(one, ModuleNotFoundError) and one.name]
        lacks = (
            f"the package {absent[0].partition('.')[0]}, which is not installed"
            if absent
            else f"a package that fails ({error})"
        )
        raise SaeError(f'{what}: needs {lacks}; `pip install "{of}[{extra}]"`') from error
