"""Files as a stranger would write them: a small cache and a run of it, and every way to make one of its files lie.

A stranger knows the formats: what is under a checksum is sealed again, and a folder is renamed to its recipe's hash.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numcodecs.zstd import Zstd
from support.command_line import done
from transformers import GPT2Config, GPT2LMHeadModel

from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import checksum
from sae.cache.disk.identity import digest
from sae.cache.disk.sealed import sealed as sealed_file
from sae.cache.disk.tensors import read_tensors, write_tensors
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CHECKPOINT, LATENTS, WEIGHTS, WEIGHTS_CONFIG
from sae.cache.store.head import RECIPE, head_bytes
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.notes import note_bytes
from sae.cache.store.store import HINTS, REQUEST, Store
from sae.cache.tokens import VOCABULARY, TokenStore

VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**12, 10**30, 0.5, 1e308, "", "..", "/etc/passwd", "../../outside", "\x1b[2J\u202e",
    "<script>", "s3://bucket/x", [], {}, [[]], "a" * 5000,
]  # fmt: skip
RAW: dict[str, bytes] = {
    "empty": b"", "no JSON": b"{", "a mark": b"\xef\xbb\xbf{}", "no UTF-8": b'{"a": "\xff"}', "a NUL": b"{}\0",
    "null": b"null", "a list": b"[]", "an object": b"{}", "twice": b'{"step": 1, "step": 2}', "NaN": b'{"step": NaN}',
    "deep": b"[" * 10**5,
    "deep objects": b'{"a":' * 10**5, "digits": b'{"step": ' + b"9" * 5000 + b"}", "infinite": b'{"rows": 1e999}',
    "half a pair": b'{"a": "\\ud800"}', "large": b'"' + b"a" * (1 << 20) + b'"',
}  # fmt: skip


class Lie(NamedTuple):
    """One change of a home: what it is, and what makes it."""

    name: str
    tell: Callable[[Path], None]


def honest_home(home: Path) -> None:
    """A text, a model, a cache of both and a run that was trained, judged and reported. Call it inside `home`."""
    words = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").split()
    documents = [" ".join(words[i : i + 15]) for i in range(0, 165, 15)]
    (home / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    (home / "outside").mkdir()
    (home / "outside" / "secret").write_text("not yours")
    torch.manual_seed(1)
    shape = GPT2Config(vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(home / "model")
    done("tokenize --source text.txt --tokenizer tiny --context 16 --tokens all --validation 0.2 --workers 1")
    done("harvest --model model --layer 1 --site mlp_out --set harvest.batch_tokens=80")
    done("train --d-sae 32 --k 4 --batch 16 --steps 4 --name one --set train.log_every=2 --device cpu")
    done("eval one --device cpu")
    done("report one --device cpu")


def store_of(home: Path, kind: str) -> Store:
    """The training store of a kind."""
    one = next(path for path in sorted((home / "cache" / kind).iterdir()) if "validation" not in path.name)
    return {"tokens": TokenStore, "activations": ActivationStore}[kind](one)


def lies(home: Path) -> Iterator[Lie]:
    """Every lie about a home, in a fixed order."""
    for kind in ("tokens", "activations"):
        store = store_of(home, kind)
        named = f"{kind}: "
        for name in (RECIPE, MANIFEST, REQUEST, HINTS, "zarr.json", "rows/zarr.json", "tokens/zarr.json", VOCABULARY):
            if (store.path / name).exists():
                yield from _raw(named, store.path.relative_to(home) / name)
        yield from _recipes(named, store)
        yield from _lines(named, store)
        yield from _notes(named, store)
        yield from _chunks(named, store)
    for name in ("config.json", "metrics.jsonl", "eval/eval.json", "eval/features.json", "eval/study.json"):
        yield from _raw("run: ", Path("runs/one") / name)
    yield from _raw("cache: ", Path("cache/latest.json"))
    for name in ("config.json", "eval/eval.json", "eval/features.json"):
        path = Path("runs/one") / name
        content = json.loads((home / path).read_bytes())
        del content["crc"]
        for where, value, changed in _changes(content):
            yield Lie(f"run: {name} {where} = {value}", _makes(path, changed, _sealed_if_mapping))
    content = [json.loads(line) for line in (home / "runs/one/metrics.jsonl").read_bytes().splitlines()]
    for where, value, changed in _changes(content):
        made = changed()
        text = "".join(json.dumps(line) + "\n" for line in made) if isinstance(made, list) else "x\n"
        yield Lie(f"run: metrics.jsonl {where} = {value}", _logs(text.encode()))
    yield from _tensors(home)


def _raw(kind: str, path: Path) -> Iterator[Lie]:
    for name, data in RAW.items():
        yield Lie(f"{kind}{path.name} is {name}", _writes(path, data + b"\n" * path.name.endswith("jsonl")))

    def folder(home: Path) -> None:
        (home / path).unlink(missing_ok=True)
        (home / path).mkdir(parents=True)

    def pipe(home: Path) -> None:
        (home / path).unlink(missing_ok=True)
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(home / path)

    yield Lie(f"{kind}{path.name} is a folder", folder)
    yield Lie(f"{kind}{path.name} is a pipe", pipe)


def _recipes(kind: str, store: Store) -> Iterator[Lie]:
    """Sealed recipes in folders of their hash, with the run that was trained on them."""
    for where, value, changed in _changes(store.recipe):
        recipe = changed()
        if not isinstance(recipe, dict):
            continue

        def tell(home: Path, recipe: dict[str, Any] = recipe) -> None:
            key = f"{store.path.name[:-8]}{digest(recipe)}"
            to = home / store.path.relative_to(home).with_name(key)
            if key != store.path.name:
                store.path.rename(to)
            (to / RECIPE).write_bytes(head_bytes(store.kind, store.slug, recipe))
            if store.kind == "activations":
                _on(home, key, recipe)

        yield Lie(f"{kind}recipe {where} = {value}", tell)
    for slug in ("../../outside/x", "/etc", "\x1b[2J", "a" * 5000, "=cmd", "", "<b>"):
        yield Lie(
            f"{kind}slug {slug[:20]!r}", _writes(_inside(store, RECIPE), head_bytes(store.kind, slug, store.recipe))
        )
    for other in ("tokens", "activations", "pictures", "../x"):
        yield Lie(f"{kind}kind {other}", _writes(_inside(store, RECIPE), head_bytes(other, store.slug, store.recipe)))


def _on(home: Path, key: str, recipe: Any) -> None:
    """A run that says it was trained on this, and a cache that says it made it last."""
    config = json.loads((home / "runs/one/config.json").read_bytes())
    config["activations"] |= {"key": key, "recipe": recipe}
    (home / "runs/one/config.json").write_bytes(json.dumps(config, indent=2).encode())
    latest = json.loads((home / "cache/latest.json").read_bytes())
    (home / "cache/latest.json").write_bytes(json.dumps(latest | {"activations": [key]}, indent=2).encode())


def _lines(kind: str, store: Store) -> Iterator[Lie]:
    path = _inside(store, MANIFEST)
    lines = [json.loads(line)["line"] for line in (store.path / MANIFEST).read_bytes().splitlines()]
    for index in {0, len(lines) // 2, len(lines) - 1}:

        def manifest(body: Any, index: int = index) -> bytes:
            return b"".join(sealed(body if i == index else line) for i, line in enumerate(lines))

        for where, value, changed in _changes(lines[index]):
            yield Lie(f"{kind}manifest line {index + 1} {where} = {value}", _makes(path, changed, manifest))
    first = lines[0]
    for name in ("../../../outside/secret", "/etc/passwd", "rows/c/../../x", "rows/c/999", "x", "", ".", "recipe.json"):
        more = {**first, "files": {**first["files"], name: [9, checksum(b"not yours")]}}
        yield Lie(f"{kind}manifest lists {name}, too", _writes(path, b"".join(map(sealed, [more, *lines[1:]]))))
        less = dict(list(first["files"].items())[1:]) | {name: [9, checksum(b"not yours")]}
        yield Lie(
            f"{kind}manifest lists {name} instead",
            _writes(path, b"".join(map(sealed, [{**first, "files": less}, *lines[1:]]))),
        )
    far = {**lines[-2], "window": 10**12, "rows": [10**15, 10**15 + 64]}
    for name, said in {
        "a window far on": [*lines[:-1], far], "an end far on": [*lines[:-1], {"end": 10**18}], "no window": lines[1:],
        "the end first": [lines[-1], *lines[:-1]], "a window twice": [lines[0], *lines],
    }.items():  # fmt: skip
        yield Lie(f"{kind}manifest has {name}", _writes(path, b"".join(map(sealed, said))))
        yield Lie(f"{kind}manifest has {name} and no more", _writes(path, b"x\n" + b"".join(map(sealed, said))))


def sealed(body: Any) -> bytes:
    """A line of the manifest as its writer would write it."""
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    crc = checksum(text.encode())
    return json.dumps({"crc": crc, "line": body}, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _notes(kind: str, store: Store) -> Iterator[Lie]:
    for name, key in ((REQUEST, "rows"), (HINTS, "model"), (HINTS, "tokenizer"), (HINTS, "source"), (HINTS, "other")):
        for value in VALUES:
            yield Lie(f"{kind}{name} {key} = {value!r:.30}", _writes(_inside(store, name), note_bytes({key: value})))


def _chunks(kind: str, store: Store) -> Iterator[Lie]:
    for spec in store.arrays.values():
        name = spec.chunk_file(0)
        good = spec.decode((store.path / name).read_bytes())
        raw = good.tobytes()
        skipped = b"\x50\x2a\x4d\x18\x02\0\0\0xx"
        frames = {
            "empty": b"", "raw": raw, "cut": (store.path / name).read_bytes()[:-1], "short": _frame(raw[:-1]),
            "long": _frame(raw + b"\0"), "bomb": _frame(bytes(64 << 20)), "twice": _frame(raw) * 2,
            "and more": _frame(raw) + skipped, "skipped": skipped + _frame(raw), "lying": _lying(_frame(raw), 1 << 40),
            "no size": _sizeless(_frame(raw)),
        }  # fmt: skip
        for what, data in frames.items():
            yield Lie(f"{kind}{name} is {what}", _stores(store, name, data))
        for what, fill in (("ones", 0xFF), ("zeros", 0), ("halves", 0x7F), ("middle", 0x80), ("signs", 0x7C)):
            data = bytes([fill]) * len(raw)
            yield Lie(f"{kind}{name} holds {what}", _stores(store, name, data if spec.zstd is None else _frame(data)))


def _frame(data: bytes) -> bytes:
    return bytes(Zstd(level=1).encode(np.frombuffer(data, np.uint8)))


def _lying(frame: bytes, size: int) -> bytes:
    """A frame whose header promises another size: 8 bytes of it, single segment."""
    return frame[:4] + b"\xe0" + size.to_bytes(8, "little") + frame[4 + 1 + {0: 1, 1: 2, 2: 4, 3: 8}[frame[4] >> 6] :]


def _sizeless(frame: bytes) -> bytes:
    """A frame that does not say how much it holds."""
    return frame[:4] + b"\x00\x58" + frame[4 + 1 + {0: 1, 1: 2, 2: 4, 3: 8}[frame[4] >> 6] :]


def _stores(store: Store, name: str, data: bytes) -> Callable[[Path], None]:
    """Other bytes of a file, listed with their size and checksum."""

    def tell(home: Path) -> None:
        (store.path / name).write_bytes(data)
        lines = [json.loads(line)["line"] for line in (store.path / MANIFEST).read_bytes().splitlines()]
        lines[0]["files"][name] = [len(data), checksum(data)]
        (store.path / MANIFEST).write_bytes(b"".join(map(sealed, lines)))

    return tell


def _logs(data: bytes) -> Callable[[Path], None]:
    """Other metrics, and a checkpoint that follows them."""

    def tell(home: Path) -> None:
        run = home / "runs/one"
        (run / METRICS).write_bytes(data)
        tensors, header = read_tensors(run / CHECKPOINT)
        known = json.dumps({"bytes": len(data), "crc32c": checksum(data)})
        write_tensors(run, CHECKPOINT, tensors, {"state": header["state"], "metrics": known})

    return tell


def _tensors(home: Path) -> Iterator[Lie]:
    for name in (WEIGHTS, CHECKPOINT, LATENTS):
        path = home / "runs/one" / name
        beside = (home / "runs/one" / WEIGHTS_CONFIG).read_bytes() if name == WEIGHTS else b""
        tensors, header = read_tensors(path, extra_file=beside)
        del header["crc32c"]
        yield from _raw("run: ", path.relative_to(home))

        def saves(
            tensors: dict[str, Any], header: dict[str, str] = header, name: str = name, beside: bytes = beside
        ) -> Callable[[Path], None]:
            return lambda home: write_tensors(home / "runs/one", name, tensors, header, extra_file=beside)

        for key, tensor in tensors.items():
            others = {
                "one": torch.zeros(1), "none": torch.zeros(0), "nan": torch.full(tensor.shape, math.nan),
                "whole": torch.ones(tensor.shape, dtype=torch.int64), "flat": tensor.flatten().float()[:-1],
                "deep": tensor[None], "wide": torch.zeros(*tensor.shape, 2), "huge": torch.full(tensor.shape, 3e38),
            }  # fmt: skip
            for what, other in others.items():
                yield Lie(f"run: {name} {key} is {what}", saves({**tensors, key: other}))
            gone = {other: t for other, t in tensors.items() if other != key}
            yield Lie(f"run: {name} lacks {key}", saves(gone))
            yield Lie(f"run: {name} has {key} by another name", saves({**gone, "../" + key: tensor}))
        if "state" in header:
            for where, value, changed in _changes(json.loads(header["state"])):
                said = json.dumps(changed())
                yield Lie(f"run: {name} state {where} = {value}", saves(tensors, {**header, "state": said}))
            for what, data in RAW.items():
                said = data.decode("utf-8", "replace")
                yield Lie(f"run: {name} state is {what}", saves(tensors, {**header, "state": said}))


def _changes(content: Any) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(place, value, what makes the content with it): every value at every place, and every place gone."""
    text = json.dumps(content)
    for place in _places(content):
        where = ".".join(map(str, place))
        for value in VALUES:
            yield where or "all", f"{value!r:.30}", partial(_changed, text, place, value)
        if place:
            yield where, "gone", partial(_changed, text, place, _put)


def _changed(text: str, place: tuple[Any, ...], value: Any) -> Any:
    return _put(json.loads(text), place, value)


def _places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is; of lists the first, and of chunks' names one a kind."""
    yield at
    if isinstance(content, dict):
        kinds = {re.sub(r"\d+", "0", str(name)): name for name in reversed(content)}
        for name in kinds.values():
            yield from _places(content[name], (*at, name))
    elif isinstance(content, list) and content:
        yield from _places(content[0], (*at, 0))


def _put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    inside = content
    for part in place[:-1]:
        inside = inside[part]
    if value is _put:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return content


def _inside(store: Store, name: str) -> Path:
    return Path("cache") / store.kind / store.path.name / name


def _sealed_if_mapping(content: Any) -> bytes:
    return sealed_file(content) if isinstance(content, dict) else json.dumps(content).encode()


def _makes(path: Path, content: Callable[[], Any], form: Callable[[Any], bytes]) -> Callable[[Path], None]:
    """Write a file that is made when it is told: most of the many lies never are."""
    return lambda home: _writes(path, form(content()))(home)


def _writes(path: Path, data: bytes) -> Callable[[Path], None]:
    def tell(home: Path) -> None:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(data)

    return tell


__all__ = ["Lie", "honest_home", "lies", "sealed", "store_of"]
