"""The source `python`: the text that ships with every Python, so that the whole tool can be tried without a network.

Three kinds of document, in this order:

1. the language reference, one topic of `pydoc_data.topics` a document;
2. the source files of the standard library, one file a document;
3. the docstrings of the modules written in C, whose source is not on disk, one module a document.

Left out: tests, vendored packages, IDLE, machine-made files and tables of data.
Text that an earlier document already holds is dropped (whole files by equality, docstrings line by line: the C and the
Python twin of `io` or `decimal` share theirs), so that a validation split by document does not leak.

The text differs from one Python to the next; the recipe holds the version and a digest of the content.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from cache.errors import SaeError
from pipeline.sources.base import DocumentStream, Indexed, source

# Whole packages left out: tests, copies of other projects, and packages that are mostly tables.
_SKIPPED_FOLDERS = {
    "__phello__", "__pycache__", "_bundled", "encodings", "ensurepip", "idlelib", "idle_test", "lib2to3", "msilib",
    "pydoc_data", "test", "tests", "turtledemo",
}  # fmt: skip
# Files that are one long table, or that no two machines share.
_SKIPPED_FILES = {"__hello__.py", "_compat_pickle.py", "entities.py", "locale.py", "stringprep.py"}

# The modules written in C whose documentation is worth reading. Named one by one: importing everything in lib-dynload
# would initialise readline, print deprecation warnings and load CPython's own test modules.
_C_MODULES = (
    "_abc", "_asyncio", "_ast", "_bisect", "_blake2", "_bz2", "_codecs", "_collections", "_contextvars", "_csv",
    "_ctypes", "_curses", "_datetime", "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp",
    "_io", "_json", "_locale", "_lsprof", "_lzma", "_multiprocessing", "_opcode", "_operator", "_pickle",
    "_posixsubprocess", "_queue", "_random", "_signal", "_socket", "_sqlite3", "_sre", "_ssl", "_stat",
    "_statistics", "_string", "_struct", "_symtable", "_thread", "_tracemalloc", "_typing", "_uuid", "_warnings",
    "_weakref", "_zoneinfo", "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "fcntl",
    "gc", "grp", "itertools", "marshal", "math", "mmap", "posix", "pwd", "pyexpat", "resource", "select", "sys",
    "syslog", "termios", "time", "unicodedata", "zlib",
)  # fmt: skip


class Library(NamedTuple):
    """The documents, a digest of them, and what was left out: reason -> how many."""

    documents: tuple[str, ...]
    digest: str
    skipped: dict[str, int]


@functools.cache
def library() -> Library:
    """Read the running Python's text (about half a second, about 10 MB; kept for the life of the process)."""
    documents: list[str] = []
    skipped = {"not UTF-8": 0, "repeated": 0, "module not here": 0}
    seen: set[str] = set()
    for text in [*_topics(skipped), *_source_files(skipped)]:
        if text in seen:
            skipped["repeated"] += 1
        elif text.strip():
            seen.add(text)
            documents.append(text)
    # Docstrings repeat each other and the sources a paragraph at a time, so they are compared by their lines.
    lines = {line.strip() for text in documents for line in text.splitlines()}
    for name in _C_MODULES:
        module = _import(name)
        if module is None:
            skipped["module not here"] += 1
        elif text := _docstrings(name, module, lines):
            documents.append(text)
    digest = hashlib.blake2b(digest_size=16)
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return Library(tuple(documents), digest.hexdigest(), skipped)


def _topics(skipped: dict[str, int]) -> list[str]:
    module = _import("pydoc_data.topics")
    if module is None:
        skipped["module not here"] += 1
        return []
    return [text for _, text in sorted(module.topics.items())]


def _source_files(skipped: dict[str, int]) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sys.stdlib_module_names  # not site-packages, and not what a distribution adds beside the library
    for folder, folders, files in os.walk(root):
        top = Path(folder) == root
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and (f in names or not top))
        for file in sorted(files):
            if not file.endswith(".py") or file in _SKIPPED_FILES or (top and file[:-3] not in names):
                continue
            try:
                yield (Path(folder) / file).read_bytes().decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1


def _import(name: str) -> ModuleType | None:
    """The module, or None where this Python was built (or packaged) without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(name)
    except ImportError:
        return None


def _docstrings(name: str, module: ModuleType, lines: set[str]) -> str:
    """What `module` says of itself and its public members, less what only repeats `lines`; adds its lines to them."""
    parts: list[str] = []

    def say(title: str, doc: object, indent: str) -> None:
        if not isinstance(doc, str) or not doc.strip():
            return
        text = inspect.cleandoc(doc)
        new = {line.strip() for line in text.splitlines()}
        if new <= lines:
            return
        lines.update(new)
        parts.append(f"{title}\n{textwrap.indent(text, indent)}\n")

    say(f"module {name}", module.__doc__, "")
    for key, value in _public(module):
        say(_title(f"{name}.{key}", value), _doc(value), "    ")
        if isinstance(value, type):
            for method, member in _public(value):
                say(_title(f"{name}.{key}.{method}", member), _doc(member), "    ")
    return "\n".join(parts)


def _public(owner: Any) -> list[tuple[str, Any]]:
    """Public members, less what a program may have put there: functions written in Python and replaced hooks.

    Typer replaces `sys.excepthook`, for one: the text, and with it the recipe, must not depend on who asks.
    """
    return [
        (key, value)
        for key, value in sorted(vars(owner).items())
        if not key.startswith("_")
        and not (owner is sys and key.endswith("hook"))
        and not isinstance(value, FunctionType)
    ]


def _doc(value: Any) -> object:
    """Its own docstring: a plain value has only its type's, which says nothing of it."""
    doc = getattr(value, "__doc__", None)
    return doc if isinstance(value, type) or doc != getattr(type(value), "__doc__", None) else None


def _title(name: str, value: Any) -> str:
    signature = getattr(value, "__text_signature__", None)
    return name + (signature.replace("$", "") if isinstance(signature, str) else "")


class PythonLibrary:
    """The source itself; `state()` is the index of the next document."""

    slug = "python"

    def recipe(self) -> dict[str, Any]:
        """Identity: the Python version and a digest of the text."""
        return {"source": "python", "python": ".".join(map(str, sys.version_info[:3])), "digest": library().digest}

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """All documents, in a fixed order."""
        if not library().documents:
            raise SaeError("--source python: this Python has no library source on disk; give a text file instead")
        return Indexed(library().documents, state)


@source("python", order=0, help="the text that ships with Python: language reference and standard library (no network)")
def _resolve(spec: str, offline: bool, column: str) -> PythonLibrary | None:
    return PythonLibrary() if spec == "python" else None
