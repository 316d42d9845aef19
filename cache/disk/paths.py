"""The place of a cache: a folder of this machine, or a URL of a filesystem fsspec knows, as s3://bucket/prefix.

A remote place is a universal_pathlib UPath. It has the part of pathlib's interface that stores use (`/`, `name`,
`parent`, `read_bytes`, `exists`, `glob`, `unlink`, ...), so everything but writing, locking and listing is the same
code for both, typed for Path. Listings are never cached: what another process wrote is seen at once. Endpoints and
credentials are the filesystem's own matter (for S3 the usual AWS_... variables and files), no options of ours.
"""

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from sae.cache.errors import SaeError, needing

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
S3 = ("s3", "s3a")
NO_SUCH_RANGE = re.compile(r"InvalidRange|range.* not satisfiable", re.IGNORECASE)
# the first request of a command: a wrong endpoint is said within seconds, later ones outlast a short outage
QUICK = {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 5}}


def parse_path(text: str) -> Path:
    """The folder or file that a text names: a path of this machine, or a URL (of which nothing is asked yet).

    Raises SaeError for a filesystem that is not known or not installed, and for a name with a pattern in it.
    """
    if not URL.match(text):
        return Path(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if set("*?[") & set(text):
        raise SaeError(f"{text}: *, ? and [ are patterns to remote filesystems; choose another name")
    return cast(Path, _remote(text, {}))  # no subclass of Path, but all of it that we use


def expect_reachable(argument: str, path: Path) -> None:
    """One quick request to a remote place. Raises SaeError, naming the argument, where it cannot be used.

    There need not be anything yet below the bucket.
    """
    assert is_remote(path)
    text, kind = str(path), str(path).partition("://")[0]
    bucket, _, prefix = filesystem_path(path).strip("/").partition("/")
    if not bucket:
        raise SaeError(f"{argument} = {text}: names no bucket or folder; write s3://bucket/prefix")
    hint = "the bucket, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, ...)" if kind in S3 else "the URL"
    try:
        if kind in S3:  # `exists` says False of a missing bucket and of one that may not be read
            _remote(text, QUICK).fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        else:
            path.exists()
    except failures() as error:
        raise SaeError(f"{argument} = {text}: cannot be used ({reason(error)}); check {hint}") from error
    except ValueError as error:  # an endpoint that is no URL
        raise SaeError(f"{argument} = {text}: {reason(error)}; check {hint}") from error


def is_remote(path: Path) -> bool:
    """Return True if a place is a URL's."""
    return not isinstance(path, Path)


def filesystem(path: Path) -> Any:
    """The fsspec filesystem of a remote place."""
    return path.fs  # type: ignore[attr-defined]


def filesystem_path(path: Path) -> str:
    """A remote place as its filesystem names it."""
    return str(path.path)  # type: ignore[attr-defined]


def fetched(path: Path, most: int | None = None) -> bytes:
    """The bytes of a remote file (`most` of them where given), by one request whatever is there.

    Raises FileNotFoundError, or one of `failures`.
    """
    try:  # the range is why S3 is not asked for the size first; between two requests the object may be replaced
        return cast(bytes, filesystem(path).cat_file(filesystem_path(path), start=0, end=most))
    except failures() as error:
        if NO_SUCH_RANGE.search(f"{error} {error.__cause__}"):  # every file but an empty one has a byte 0
            return b""
        raise


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder, by its name relative to it: its size in bytes. Empty where there is no folder."""
    if not is_remote(folder):
        found: dict[str, int] = {}
        for path in sorted(folder.rglob("*")):
            with suppress(FileNotFoundError):  # a temporary file of a living writer comes and goes
                if path.is_file():
                    found[path.relative_to(folder).as_posix()] = path.stat().st_size
        return found
    inside = filesystem_path(folder).rstrip("/") + "/"
    sizes = filesystem(folder).find(inside, detail=True)
    return {name.removeprefix(inside): int(sizes[name]["size"]) for name in sorted(sizes)}


def reason(error: Exception) -> str:
    """Return the message of a filesystem's error, in one line without a full stop."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def outage(error: Exception) -> str | None:
    """Return the message of a failed request to a remote filesystem; None for any other error."""
    chain = [error, error.__cause__, error.__context__]
    clients = ("botocore", "aiobotocore", "aiohttp")
    return reason(error) if any(type(e).__module__.partition(".")[0] in clients for e in chain) else None


def failures() -> tuple[type[Exception], ...]:
    """Return the errors of a failed read or write: OSError, and what the clients of S3 raise beside it."""
    kinds: list[type[Exception]] = [OSError]
    if "botocore.exceptions" in sys.modules:  # looked up only where something failed, and never imported for it
        kinds.append(sys.modules["botocore.exceptions"].BotoCoreError)
    if "aiohttp" in sys.modules:
        kinds.append(sys.modules["aiohttp"].ClientError)
    return tuple(kinds)


def _remote(text: str, options: dict[str, Any]) -> Any:
    """A UPath. Raises SaeError for a filesystem that is not known or not installed."""
    from upath import UPath

    kind = text.split("://")[0]
    with needing(text, extra="s3") if kind in S3 else needing(text, extra=kind, of="fsspec"):
        try:
            remote = UPath(text, use_listings_cache=False, **options)
            assert remote.fs is not None  # made here, so that a package that lacks is missed here
            return remote
        except ValueError as error:
            raise SaeError(f"{text}: cannot be used ({reason(error)}); name a folder or s3://bucket/prefix") from error
