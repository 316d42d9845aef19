"""`sae cache`: the stores on disk; `export`, `gc` and `verify` have files of their own."""

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cache.disk.paths import is_remote
from sae.cache.errors import DamagedStore, SaeError
from sae.pipeline.commands.cache_export import export
from sae.pipeline.commands.cache_gc import gc
from sae.pipeline.commands.cache_verify import verify
from sae.pipeline.commands.options import CacheRoot, Json, StoreName, Yes, cache_root, complete_store
from sae.pipeline.commands.shown import report_damage

if TYPE_CHECKING:
    from sae.cache.upkeep.usage import Part, Usage

app = typer.Typer(
    help="Look at the stores of the cache, check and repair them, export them, remove them.", no_args_is_help=True
)


@app.command("ls")
def ls(cache: CacheRoot = None, json: Json = False) -> None:
    """List the stores. Exit code 3 where one cannot be read; the others are listed all the same.

    Example: `sae cache ls --json`.
    """
    from sae.cache import catalogue
    from sae.cache.upkeep import garbage, removing
    from sae.pipeline.commands import console

    root = cache_root(cache)
    removing.finish(root)
    stores, damage = catalogue.readable(root)
    entries = [(catalogue.entry(store), garbage.written(store)) for store in stores]
    if json:
        console.as_json([{**entry.as_json(), "written": written} for entry, written in entries])
    elif entries:
        rows = [
            [e.key, e.kind, e.rows, console.size(e.bytes), "yes" if e.complete else "no", since(written)]
            for e, written in entries
        ]
        console.table(str(root), ["key", "kind", "rows", "size", "complete", "written"], rows)
    elif not damage:
        console.say(f"{root}: no stores yet; `sae tokenize` makes the first")
    report_damage(damage)


@app.command("inspect")
def inspect(
    store: StoreName,
    shuffle_quality: Annotated[bool, typer.Option("--shuffle-quality", metavar="", help="Measure how well batches of the loader (4,096 rows) mix documents.")] = False,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Everything about one store: recipe, arrays, windows, statistics, rows that lie far out.

    Examples: `sae cache inspect gpt2-6.mlp_out`, `sae cache inspect gpt2-6.mlp_out --shuffle-quality`.
    """
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore
    from sae.cache.massive import beyond_usual
    from sae.pipeline.commands import console

    root = cache_root(cache)
    found = catalogue.any_store(root, store)
    description = {**catalogue.entry(found).as_json(), **found.describe()}
    damage = []
    if isinstance(found, ActivationStore):
        try:
            far = beyond_usual(found, found.n_rows)
            description["far_rows"] = None if far is None else far.as_json() if json else str(far)
        except DamagedStore as error:
            damage.append(str(error))
    if shuffle_quality:
        from sae.cache.loader.shuffle_quality import mixing_of

        description["shuffle_quality"] = mixing_of(root, found).as_json()
    if json:
        console.as_json(description)
    else:
        console.outline(description)
    report_damage(damage)


@app.command("du")
def du(
    store: Annotated[str | None, typer.Argument(metavar="STORE", autocompletion=complete_store, show_default=False, help="Key, the beginning of a key, or a path. Default: every store.")] = None,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Where the bytes are: by store and array, a row, and as a share of plain float32; and what nothing accounts for.

    Examples: `sae cache du`, `sae cache du gpt2-6.mlp_out --json`.
    """
    from sae.cache import catalogue
    from sae.cache.upkeep import usage
    from sae.pipeline.commands import console

    root = cache_root(cache)
    found, damage = catalogue.readable(root, None if store is None else [catalogue.located(root, store)])
    entries = [usage.usage(one) for one in found]
    strays = usage.strays(root, entries) if store is None else 0
    total = sum(entry.total.bytes for entry in entries) + strays
    if json:
        console.as_json({"stores": [e.as_json() for e in entries], "not_readable": strays, "bytes": total})
    else:
        rows = [row for entry in entries for row in usage_rows(entry)]
        rows += [["not a readable store", "", console.size(strays), "", ""]] if strays else []
        rows += [["total", "", console.size(total), "", ""]]
        console.table(str(root), ["what", "rows", "size", "a row", "of float32"], rows)
    report_damage(damage)


app.command("verify")(verify)
app.command("gc")(gc)


@app.command("rm")
def rm(
    stores: Annotated[list[str], typer.Argument(metavar="STORE", autocompletion=complete_store, help="Keys, beginnings of keys, or paths.")],
    yes: Yes = False, cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Remove stores, damaged ones too. Asks first, unless `--yes`.

    Example: `sae cache rm gpt2-6.mlp_out --yes`.
    """
    from sae.cache import catalogue
    from sae.cache.upkeep import removing
    from sae.pipeline.commands import console

    root = cache_root(cache)
    finished = removing.finish(root)  # the same command again, where it was killed
    left = [name for name in stores if not any(key.startswith(name) for key in finished)]
    found = list(dict.fromkeys(removing.removable(root, name) for name in left))
    if found and not yes:
        sizes = ", ".join(f"{path.name} ({console.size(catalogue.bytes_in(path))})" for path in found)
        if not console.agreed(f"Remove {sizes}?"):
            raise SaeError("not confirmed, so nothing was removed; --yes does not ask")
    links = {path.name: os.readlink(path) for path in found if not is_remote(path) and path.is_symlink()}
    freed = dict.fromkeys(finished, 0) | {path.name: removing.remove(root, path) for path in found}
    if json:
        console.as_json({"removed": freed})
    for key, size in {} if json else freed.items():
        what = f"a link; {links[key]} is as it was" if key in links else console.size(size)
        console.say(f"removed {key}, {'which had been cut short' if key in finished else what}")


app.command("export")(export)


def since(written: float | None) -> str:
    """Return how long ago a store was written."""
    from sae.pipeline.commands import console

    return "never" if written is None else f"{console.ago(time.time() - written)} ago"


def usage_rows(entry: "Usage") -> list[list[str]]:
    """A store's lines in a table of `du`: the whole of it, and what it is made of."""
    from sae.pipeline.commands import console

    def line(name: str, rows: str, part: "Part") -> list[str]:
        per_row = "" if part.per_row is None else f"{part.per_row:,.1f} B"
        share = "" if part.of_float32 is None else f"{100 * part.of_float32:.1f} %"
        return [name, rows, console.size(part.bytes), per_row, share]

    parts = [line(f"  {name}", "", part) for name, part in entry.arrays.items()]
    parts += [["  recipe, manifest and the like", "", console.size(entry.other), "", ""]]
    parts += [["  left by a crash", "", console.size(entry.unaccounted), "", ""]] if entry.unaccounted else []
    return [line(entry.key, f"{entry.rows:,}", entry.total), *parts]
