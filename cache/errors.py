"""The one error tree. Everything a user can cause is a `SaeError`; anything else is our bug.

SaeError            the input cannot be used: one line, what is wrong and what to try (exit code 2)
├── NotFound        a store, run or name that is not there
├── Busy            another living process holds the lock
└── DamagedStore    the bytes on disk are not the bytes that were committed (exit code 3)
"""


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
