"""The source `python`: the text that ships with every Python, so that the whole tool can be tried without a network.

Three kinds of document, in this order:

1. the language reference, one topic of `pydoc_data.topics` a document;
2. the source files of the standard library, one file a document;
3. the docstrings of the modules written in C, whose source is not on disk, one module a document.

Left out: tests, vendored packages, IDLE, machine-made files and tables of data.
A topic, file or docstring most of whose lines an earlier one already said is dropped (the reference's chapters contain
shorter topics whole; the C and the Python twin of `io` or `decimal` share docstrings), so that a validation split by
document does not leak.

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
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

from sae.cache.errors import SaeError
from sae.pipeline.tokenize.sources.base import DocumentStream, Indexed, source

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


_REPEATED = 0.7  # share of a text's lines that were said before, from which it counts as a repetition


class Library(NamedTuple):
    """The documents, a digest of them, and what was left out: reason -> how many."""

    documents: tuple[str, ...]
    digest: str
    skipped: dict[str, int]


@functools.cache
def library() -> Library:
    """Read the running Python's text (about half a second, about 10 MB; kept for the life of the process)."""
    skipped = {"not UTF-8": 0, "repeated": 0, "module not here": 0}
    said = _Said(skipped)
    documents = _topics(said, skipped)
    documents += [text for text in _source_files(skipped) if said.new(text)]
    for name in _C_MODULES:
        module = _import(name)
        if module is None:
            skipped["module not here"] += 1
        elif text := _docstrings(name, module, said):
            documents.append(text)
    digest = hashlib.blake2b(digest_size=16)
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return Library(tuple(documents), digest.hexdigest(), skipped)


class _Said:
    """The lines of everything taken so far."""

    def __init__(self, skipped: dict[str, int]) -> None:
        self._lines: set[str] = set()
        self._skipped = skipped

    def new(self, text: str) -> bool:
        """Return True if `text` says something of its own; if so, its lines are said from now on."""
        stripped = {line.strip() for line in text.splitlines()}
        # Short lines ("else:", "return None") are everybody's.
        lines = {line for line in stripped if len(line) > 8} or stripped - {""}
        if len(lines & self._lines) >= _REPEATED * len(lines):
            self._skipped["repeated"] += bool(lines)
            return False
        self._lines |= stripped
        return True


def _topics(said: _Said, skipped: dict[str, int]) -> list[str]:
    module = _import("pydoc_data.topics")
    if module is None:
        skipped["module not here"] += 1
        return []
    topics: dict[str, str] = module.topics
    # The longest first: a chapter stays, and the sections of it that are topics as well go.
    kept = [name for name in sorted(topics, key=lambda name: (-len(topics[name]), name)) if said.new(topics[name])]
    return [topics[name] for name in sorted(kept)]


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


def _docstrings(name: str, module: ModuleType, said: _Said) -> str:
    """Return the docstrings of `module` and its public members, less what was said before."""
    parts: list[str] = []

    def say(title: str, doc: object, indent: str) -> None:
        if not isinstance(doc, str) or not doc.strip():
            return
        text = inspect.cleandoc(doc)
        if said.new(text):
            parts.append(f"{title}\n{textwrap.indent(text, indent)}\n")

    say(f"module {name}", module.__doc__, "")
    for key, value in _public(module):
        say(_title(f"{name}.{key}", value), _doc(value), "    ")
        if isinstance(value, type):
            for method, member in _public(value):
                say(_title(f"{name}.{key}.{method}", member), _doc(member), "    ")
    return "\n".join(parts)


def _public(owner: ModuleType | type) -> list[tuple[str, Any]]:
    """Public members, less what a program may have put there: things written in Python, replaced hooks.

    Typer replaces `sys.excepthook` and IPython adds built-ins, for two: the text, and with it the recipe, must not
    depend on who asks.
    """
    members = [(key, value) for key, value in sorted(vars(owner).items()) if not key.startswith("_")]
    if isinstance(owner, type):
        return [(key, value) for key, value in members if not isinstance(value, FunctionType)]
    return [
        (key, value)
        for key, value in members
        if isinstance(value, type | BuiltinFunctionType) and not (owner is sys and key.endswith("hook"))
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
            raise SaeError("source = python: this Python has no library source on disk; give a text file instead")
        return Indexed(library().documents, state)


@source("python", order=0, help="the text that ships with Python: language reference and standard library (no network)")
def _resolve(spec: str, offline: bool, column: str) -> PythonLibrary | None:
    return PythonLibrary() if spec == "python" else None
