"""`sae cache`: the stores on disk."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.disk.paths import is_remote
from sae.cache.errors import SaeError
from sae.pipeline.commands.options import CacheRoot, Json, StoreName, cache_root, complete_store, folder
from sae.pipeline.commands.upkeep import Yes, gc, report_damage, verify
from sae.pipeline.commands.words import count

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
    """Everything about one store: recipe, arrays, windows, statistics.

    Examples: `sae cache inspect gpt2-6.mlp_out`, `sae cache inspect gpt2-6.mlp_out --shuffle-quality`.
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    root = cache_root(cache)
    found = catalogue.any_store(root, store)
    description = {**catalogue.entry(found).as_json(), **found.describe()}
    if shuffle_quality:
        from sae.cache.loader.shuffle_quality import mixing_of

        description["shuffle_quality"] = mixing_of(root, found).as_json()
    if json:
        console.as_json(description)
    else:
        console.outline(description)


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


@app.command("export")
def export(
    store: StoreName,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make. It must not be there yet.")],
    dtype: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="float32, float16, or bfloat16 (as the uint16 of its bits, which is what Zarr can hold). Default: float32.")] = "float32",
    rows: Annotated[str, count("Rows to write, from the first on. Default: all.")] = "all",
    order: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="stored: shuffled, as training reads them; token: as they stand in the text. Default: stored.")] = "stored",
    with_tokens: Annotated[bool, typer.Option("--with-tokens", metavar="", help="Write the contexts as well that the rows came from.")] = False,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Write activations as a plain Zarr v3 array of floats, for tools that know nothing of this cache.

    DEST gets `rows` [N, d] and `position` [N] (context times context length plus place in it), and with `--with-tokens`
    `tokens` [contexts, T]; its attributes hold the recipe. It appears when it is whole.

    Examples:

        sae cache export gpt2-6.mlp_out mlp_out.zarr
        sae cache export gpt2-6.mlp_out first.zarr --rows 1M --order token --with-tokens --dtype float16
    """
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore
    from sae.cache.tokens import TokenStore
    from sae.pipeline.commands import console

    root, bars, destination = cache_root(cache), console.Bars(), folder("DEST", destination)
    found = catalogue.any_store(root, store)  # before the seconds that torch takes
    from sae.cache.upkeep import export as writing

    if not isinstance(found, ActivationStore):
        raise SaeError(f"{store}: holds {found.kind}, not activations; `sae cache ls` lists the stores")
    tokens = None
    if with_tokens:
        if "tokens" not in found.recipe:
            raise SaeError(f"--with-tokens: the rows of {found.key} come from no tokens; leave it out")
        tokens = catalogue.of_recipe(root, TokenStore, found.recipe["tokens"])
        if tokens is None:
            raise SaeError(
                f"--with-tokens: the tokens of {found.key} are not in {root}; leave it out, or tokenize again"
            )
    n = found.n_rows if rows == "all" else min(int(rows), found.n_rows)
    if rows != "all" and int(rows) > n:
        bars.note(f"--rows {int(rows):,}: {found.key} has {n:,}, all of which are written")
    bars.start("export", n, "rows")
    try:
        made = writing.export(found, destination, bars.advance, dtype=dtype, rows=n, order=order, tokens=tokens)
    finally:
        bars.finish()
    if json:
        result = {"path": str(made.path), "store": found.key, "rows": made.rows, "bytes": made.bytes}
        console.as_json({**result, "dtype": dtype, "order": order})
    else:
        console.say(f"{made.path}: {made.rows:,} rows of {found.key} as {dtype}, {console.size(made.bytes)}")


def show_stores(stores: list[Any], json: bool, name: str, extra: Callable[[Any], int]) -> None:
    """The stores a stage made, with one figure more: a table or JSON."""
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    if json:
        console.as_json({"stores": [{**catalogue.entry(store).as_json(), name: extra(store)} for store in stores]})
        return
    rows = [[s.key, s.n_rows, extra(s), console.size(s.manifest.stored_bytes)] for s in stores]
    console.table("stores", ["key", "rows", name, "size"], rows)


def since(written: float | None) -> str:
    """How long ago a store was written."""
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
