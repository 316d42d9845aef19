"""`sae cache verify`: finds damage and mends it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.pipeline.commands.options import CacheRoot, Device, Json, Offline, RunsRoot, cache_root, complete_store, folder
from sae.pipeline.commands.shown import raise_last
from sae.pipeline.commands.voice import typed

if TYPE_CHECKING:
    from sae.cache.upkeep.damage import DamagedStoreView, Finding
    from sae.cache.upkeep.repair import Repaired
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.origins import Origins
    from sae.pipeline.runtime.progress import Progress


def verify(
    store: Annotated[str | None, typer.Argument(metavar="STORE", autocompletion=complete_store, show_default=False, help="Key, the beginning of a key, or a path. Default: every store.")] = None,
    repair: Annotated[bool, typer.Option("--repair", metavar="", help="Make what is damaged again, and nothing else: activations by the model, tokens from their text.")] = False,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")] = None,
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="Where the text is now. Default: where tokenize found it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Where the tokenizer is now. Default: where tokenize found it.")] = None,
    device: Device = "auto", cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Check every file of a store against its checksum, and without STORE those of the runs. Exit code 3 for damage.

    With `--repair` exactly the damaged windows are made again, from the same tokens by the same model (or from the same
    text), and only the damaged files are written; on the same kind of machine they are what they were, byte for byte.
    A store is lost where both recipe.json and zarr.json are damaged, which say what it is, or where what it was made from
    is gone. A run cannot be made again: it is trained anew under another name.

    Examples:

        sae cache verify
        sae cache verify gpt2-6.mlp_out --repair
        sae cache verify --repair --model models/mine
    """
    from sae.cache.upkeep import damage
    from sae.pipeline.commands import console
    from sae.pipeline.commands.bars import Bars

    for option, value in {"--model": model, "--source": source, "--tokenizer": tokenizer}.items():
        if value is not None and not repair:
            raise SaeError(f"{option} {value}: is read with --repair; add it")
    root, bars = cache_root(cache), Bars()
    runs = folder("--runs", runs)
    found, hopeless, done = inspect_stores(root, store, repair)
    bars.start("verify", sum(sum(one.files.values()) for one in found), console.BYTES)
    try:
        findings = damage.verify(found, bars.advance)
    finally:
        bars.finish()
    checked, broken = check_runs(runs, bars) if store is None else ([], [])
    lines = [line for one in found for line in one.lines]
    damaged = [*hopeless, *lines, *(finding.says for finding in findings)]
    problems: list[SaeError] = [DamagedStore(line) for line in damaged]
    if repair and damaged:
        from sae.pipeline.runtime.origins import Origins

        origins = Origins(root, model=model, source=source, tokenizer=tokenizer, device=device, offline=offline)
        mended, problems = mend(found, findings, origins, bars)
        done += mended
        problems = [DamagedStore(line) for line in hopeless] + problems
    problems += [DamagedStore(line) for line in broken]
    for one in done:
        bars.note(str(one))
    if json:
        says = [typed(line) for line in damaged + broken]
        result = {"stores": [one.store.key for one in found], "runs": checked, "damage": says}
        console.as_json(result | ({"repaired": [one.as_json() for one in done]} if repair else {}))
    elif not problems:
        looked_at = [counted(len(found), "store"), *([counted(len(checked), "run")] if checked else [])]
        console.say(f"{' and '.join(looked_at)}, every byte as committed")
    raise_last(problems)


def mend(
    found: list["DamagedStoreView"], findings: list["Finding"], origins: "Origins", progress: "Progress"
) -> tuple[list["Repaired"], list[SaeError]]:
    """Make what is damaged again, each kind of store by the stage that made it: what was done, what could not be."""
    from sae.cache.activations import ActivationStore
    from sae.cache.store.store import Store
    from sae.cache.tokens import TokenStore
    from sae.cache.upkeep.repair import WindowRebuilder, repair_all
    from sae.pipeline.harvest.repair import RowMaker
    from sae.pipeline.tokenize.repair import TokenMaker

    def maker(store: Store) -> WindowRebuilder:
        if isinstance(store, TokenStore):
            return TokenMaker(store, origins, progress)
        assert isinstance(store, ActivationStore), store.kind
        return RowMaker(store, origins, progress)

    return repair_all(found, findings, maker)


def check_runs(root: Path, bars: "Bars") -> tuple[list[str], list[str]]:
    """Names of the runs below a folder whose files were read from end to end, and what is wrong with them."""
    from sae.cache import catalogue

    found, damage = catalogue.readable_runs(root, decompositions=True)
    bars.start("verify runs", len(found), "runs")
    for run in found:
        damage += run.check()
        bars.advance(1)
    bars.finish()
    if older := [run.name for run in found if not run.sealed]:
        bars.note(f"settings and figures have no checksum in runs of version 0.1.0: {', '.join(older)}")
    return [run.name for run in found], damage


def counted(n: int, what: str) -> str:
    """`1 store`, `2 stores`."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def inspect_stores(
    root: Path, store: str | None, repair: bool
) -> tuple[list["DamagedStoreView"], list[str], list["Repaired"]]:
    """The stores to verify as far as they can be read, tokens first; what is wrong with the others; mended recipes."""
    from sae.cache import catalogue
    from sae.cache.store.head import RECIPE
    from sae.cache.upkeep.damage import inspect_damage
    from sae.cache.upkeep.repair import restore_recipe

    found, damage, done = [], [], []
    every = [path for kind in catalogue.kinds() for path in catalogue.folders(root, kind)]
    lacking = catalogue.without_recipe(root) if store is None else []
    for path in [*every, *lacking] if store is None else [catalogue.located(root, store)]:
        try:
            found.append(inspect_damage(path))
        except (DamagedStore, NotFound) as error:
            restored = restore_recipe(path) if repair else None
            if restored is None:
                damage.append(f"{path / RECIPE}: missing{catalogue.REMEDY}" if path in lacking else str(error))
            else:
                done.append(restored)
                found.append(inspect_damage(path))
    found.sort(key=lambda one: list(catalogue.kinds()).index(one.store.kind))  # repaired in this order
    return found, damage, done
