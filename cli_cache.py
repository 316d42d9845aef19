"""`sae cache`: the stores on disk."""

import re
from typing import Annotated

import typer

from cache.errors import DamagedStore, SaeError
from cli_options import CacheRoot, Json, StoreName, cache_root, complete_store

REMEDY = "; remove the store (`sae cache rm`) and repeat the command that made it"

app = typer.Typer(help="Look at the stores of the cache, check them, remove them.", no_args_is_help=True)


@app.command("ls")
def ls(cache: CacheRoot = None, json: Json = False) -> None:
    """List the stores. Exit code 3 where one cannot be read; the others are listed all the same.

    Example: `sae cache ls --json`.
    """
    import console
    from cache import catalogue

    root = cache_root(cache)
    stores, damage = catalogue.readable(root)
    entries = [catalogue.entry(store) for store in stores]
    if json:
        console.as_json([entry.as_json() for entry in entries])
    elif entries:
        rows = [[e.key, e.kind, e.rows, console.size(e.bytes), "yes" if e.complete else "no"] for e in entries]
        console.table(str(root), ["key", "kind", "rows", "size", "complete"], rows)
    elif not damage:
        console.say(f"{root}: no stores yet; `sae tokenize` makes the first")
    report_damage(damage)


@app.command("inspect")
def inspect(store: StoreName, cache: CacheRoot = None, json: Json = False) -> None:
    """Everything about one store: recipe, arrays, windows, statistics.

    Example: `sae cache inspect gpt2-6.mlp_out`.
    """
    import console
    from cache import catalogue

    found = catalogue.any_store(cache_root(cache), store)
    description = {**catalogue.entry(found).as_json(), **found.describe()}
    if json:
        console.as_json(description)
    else:
        console.outline(description)


@app.command("verify")
def verify(
    store: Annotated[str | None, typer.Argument(metavar="STORE", autocompletion=complete_store, show_default=False, help="Key, the beginning of a key, or a path. Default: every store.")] = None,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Check every file of a store against its checksum. Exit code 3 where something is damaged.

    Examples: `sae cache verify`, `sae cache verify gpt2-6.mlp_out`.
    """
    import console
    from cache import catalogue

    root, bars = cache_root(cache), console.Bars()
    found, damage = catalogue.readable(root, None if store is None else [catalogue.located(root, store)])
    for one in found:
        names = [*one.metadata(), *one.committed_files()]
        bars.start(f"verify {one.key}", len(names), "files")
        for name in names:
            damage += filter(None, [one.damage(name)])
            bars.advance(1)
        bars.finish()
    if json:
        console.as_json({"stores": [one.key for one in found], "damage": damage})
    elif not damage:
        console.say(f"{len(found)} stores, every byte as committed")
    report_damage(damage)


@app.command("rm")
def rm(
    stores: Annotated[list[str], typer.Argument(metavar="STORE", autocompletion=complete_store, help="Keys, beginnings of keys, or paths.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Remove stores, damaged ones too. Asks first, unless `--yes`.

    Example: `sae cache rm gpt2-6.mlp_out --yes`.
    """
    import console
    from cache import catalogue

    root = cache_root(cache)
    found = list(dict.fromkeys(catalogue.located(root, name) for name in stores))
    if not yes:
        sizes = ", ".join(f"{path.name} ({console.size(catalogue.bytes_in(path))})" for path in found)
        if not console.agreed(f"Remove {sizes}?"):
            raise SaeError("not confirmed, so nothing was removed; --yes does not ask")
    freed = {path.name: catalogue.remove_folder(path) for path in found}
    if json:
        console.as_json({"removed": freed})
    for key, size in {} if json else freed.items():
        console.say(f"removed {key}, {console.size(size)}")


def report_damage(damage: list[str]) -> None:
    """Raise DamagedStore with the last of what is wrong, after a line of stderr for each of the others."""
    import console

    lines = [re.sub("; `sae cache verify.*", REMEDY, line) for line in damage]
    for line in lines[:-1]:
        console.complain(line)
    if lines:
        raise DamagedStore(lines[-1])
