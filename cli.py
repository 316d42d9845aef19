"""sae: run a language model once, keep its activations, train and judge sparse autoencoders from them.

Each command opens what it needs, calls one stage, and prints. Heavy imports happen inside the commands.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from enum import IntEnum
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import SaeError

if TYPE_CHECKING:
    from cache.store import Store
    from configs import Settings

app = typer.Typer(
    help="Run a language model once, keep its activations in a compact, shuffled, crash-safe cache, and train and judge "
    "any number of sparse autoencoders from it. Four stages: tokenize, harvest, train, eval; each takes up what the one "
    "before it left in the cache. Offline and curious? Run `sae demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
cache_app = typer.Typer(help="Look at the stores of the cache, check them, remove them.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


class Exit(IntEnum):
    """Exit codes: 2 the user's input, 3 damaged data (both from SaeError), 1 our bug, 130 Ctrl-C."""

    BUG = 1
    INTERRUPTED = 130


CacheRoot = Annotated[
    Path | None,
    typer.Option("--cache", envvar="SAE_CACHE", help="Folder of the cache. Default: the platform's cache folder."),
]
RunsRoot = Annotated[Path, typer.Option("--runs", envvar="SAE_RUNS", help="Folder of the runs.")]
Offline = Annotated[bool, typer.Option("--offline", envvar="SAE_OFFLINE", help="Never touch the network.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Settings to start from; `sae list` names them.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with a section a stage: tokenize, harvest, ...")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, as in --set train.lr=3e-4. Repeatable.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]


def amount(text: str) -> str:
    """A count as people write it: 500, 300k, 10M, 1e8, 1G, or all."""
    if text == "all":
        return text
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:e\d+)?)([kKMGB]?)", text)
    if not found:
        raise typer.BadParameter(f"{text!r} is no count; write 500, 300k, 10M, 1e8 or all")
    scale = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}[found[2]]
    return str(int(float(found[1].replace("_", "").replace(",", "")) * scale))


Amount = Annotated[str | None, typer.Option(parser=amount, metavar="N", help="How many: 500, 300k, 10M, or all.")]


def several(text: str | None) -> list[str] | None:
    """A comma-separated list, or None where the option was not given."""
    return None if text is None else [item.strip() for item in text.split(",")]


def cache_root(given: Path | None) -> Path:
    """The folder of the cache."""
    import platformdirs

    return (given or Path(platformdirs.user_cache_dir("sae"))).expanduser()


def settings(
    section: str,
    kind: "type[Settings]",
    preset: str | None,
    file: Path | None,
    overrides: list[str] | None,
    /,
    **flags: Any,
) -> "Settings":
    """The settings of a stage from everything the command line says."""
    from configs import resolve

    return resolve(section, kind, preset=preset, file=file, overrides=overrides or (), flags=flags)


@app.command()
def tokenize(
    source: Annotated[str | None, typer.Option(help="fineweb, python, org/name on the hub, or local files, folders, globs.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 or another tiktoken name, tiny, a Hugging Face folder.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a context.")] = None,
    tokens: Amount = None,
    packing: Annotated[str | None, typer.Option(help="concat, or document: no context crosses documents.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the document shuffle.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that encode. Default: one a core.")] = os.cpu_count() or 1,
    cache: CacheRoot = None, offline: Offline = False, preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Turn text into token stores: training and validation, no document in both.

    FineWeb through GPT-2's encoding by default. A second call with more `--tokens` continues the same store.
    """
    import console
    from cache import catalogue
    from pipeline.tokenize import TokenizeConfig
    from pipeline.tokenize import tokenize as stage

    values = settings(
        "tokenize", TokenizeConfig, preset, config, set_,
        source=source, tokenizer=tokenizer, context=context, tokens=tokens, packing=packing, seed=seed,
    )  # fmt: skip
    root = cache_root(cache)
    result = stage(values, root, console.Bars(), workers=workers, offline=offline)
    catalogue.remember(root, "tokens", [result.stores["train"].key])
    show_stores(list(result.stores.values()), json, {"tokens": lambda store: getattr(store, "n_tokens", 0)})


@app.command()
def harvest(
    model: Annotated[str | None, typer.Option(help="gpt2, any model transformer_lens boots, a local folder, or tiny.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layers from 0: 6 or 4,6,8.")] = None,
    site: Annotated[str | None, typer.Option(help="Sites: mlp_out or resid_post,mlp_out,... (`sae list`).")] = None,
    codec: Annotated[str | None, typer.Option(help="int8, bfloat16, float16, float32; settings: int8:step=0.11.")] = None,
    tokens: Amount = None,
    tokens_from: Annotated[str | None, typer.Option(help="Token store. Default: the last one made.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many rows, bytes and minutes.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait where another process is writing the same store.")] = False,
    device: Device = "auto",
    cache: CacheRoot = None, offline: Offline = False, preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Run the model over a token store and keep its activations: one pass, one store for each layer and site.

    A second call for more tokens continues the same stores.
    """
    import console
    from cache import catalogue
    from cache.tokens import TokenStore
    from pipeline.harvest import HarvestConfig
    from pipeline.harvest import harvest as stage

    values = settings(
        "harvest", HarvestConfig, preset, config, set_,
        model=model, layer=several(layer), site=several(site), codec=codec, tokens=tokens,
    )  # fmt: skip
    root = cache_root(cache)
    bars = console.Bars()
    train = catalogue.find(root, TokenStore, tokens_from, "--tokens-from", "sae tokenize")
    validation = catalogue.sibling_of(root, train, "validation")
    bars.note(f"tokens: {train.key}")
    stores = [train, *([validation] if validation is not None and validation.n_contexts else [])]
    result = stage(values, stores, root, bars, device=device, offline=offline, dry_run=dry_run, wait=wait)
    if dry_run:
        if json:
            console.as_json({"plans": [asdict(plan) for plan in result.plans]})
        return
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]])
    show_stores(
        [store for split in result.stores.values() for store in split], json, {"width": lambda s: getattr(s, "d", 0)}
    )


@app.command()
def train(
    activations: Annotated[str | None, typer.Option(help="Activation store. Default: what the last harvest made.")] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture (`sae list`).")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents a row, for architectures that fix it.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps. Default: one pass over the store.")] = None,
    rows: Annotated[str | None, typer.Option(parser=amount, metavar="N", help="Rows to see, instead of --steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder. Default: from the settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    device: Device = "auto",
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Train a sparse autoencoder on a store of activations; no language model is loaded.

    Ctrl-C writes a checkpoint; `--resume` continues it bit for bit.
    """
    import console
    from cache import catalogue
    from cache.activations import ActivationStore
    from pipeline.train import TrainConfig, open_run
    from pipeline.train import train as stage

    values = settings(
        "train", TrainConfig, preset, config, set_,
        sae={"arch": arch, "k": k, "d_sae": d_sae}, lr=lr, batch=batch, steps=steps, rows=rows, seed=seed,
    )  # fmt: skip
    bars = console.Bars()
    store = catalogue.find(cache_root(cache), ActivationStore, activations, "--activations", "sae harvest")
    bars.note(f"activations: {store.key}")
    run = open_run(values, store, runs, name, resume=resume)
    result = stage([run], store, bars, device=device)[0]
    if json:
        console.as_json({"run": str(run.path), **result})
    else:
        console.table(f"run {run.path}", ["", ""], list(result.items()))


@app.command("eval")
def evaluate(
    run: Annotated[str | None, typer.Argument(help="Run folder or its name. Default: the newest finished run.")] = None,
    rows: Annotated[str | None, typer.Option(parser=amount, metavar="N", help="Held-out rows to judge on, or all.")] = None,
    tokens: Annotated[str | None, typer.Option(parser=amount, metavar="N", help="Held-out tokens for cross-entropy.")] = None,
    activations: Annotated[str | None, typer.Option(help="Training store. Default: the one the run names.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the language model is now, if not where harvest found it.")] = None,
    device: Device = "auto",
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Judge a trained dictionary on held-out documents: reconstruction, cross-entropy when spliced in, dead latents."""
    import console
    from cache import catalogue
    from pipeline.evaluate import EvalConfig
    from pipeline.evaluate import evaluate as stage

    values = settings("eval", EvalConfig, preset, config, set_, rows=rows, tokens=tokens)
    found = catalogue.find_run(runs, run)
    bars = console.Bars()
    bars.note(f"run: {found.path}")
    result = stage(
        values, found, cache_root(cache), bars, activations=activations, model=model, device=device, offline=offline
    )
    if json:
        console.as_json(result.as_json())
    else:
        console.evaluation(result.as_json(), str(found.path))


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="Run folder or its name. Default: the newest finished run.")] = None,
    latents: Annotated[str | None, typer.Option(help="Latents to show, as in 3,17,256. Default: a sample.")] = None,
    rows: Annotated[str, typer.Option(parser=amount, metavar="N", help="Rows to search for contexts, or all.")] = "262144",
    activations: Annotated[str | None, typer.Option(help="Training store. Default: the one the run names.")] = None,
    device: Device = "auto",
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), json: Json = False,
) -> None:  # fmt: skip
    """Write a page to look at: losses, densities, cross-entropies and the text that latents fire on. One HTML file."""
    import console
    from cache import catalogue
    from pipeline.features import FeaturesConfig
    from pipeline.reporting import report as stage

    found = catalogue.find_run(runs, run)
    values = settings("report", FeaturesConfig, None, None, None, latents=several(latents), rows=rows)
    path = stage(found, cache_root(cache), console.Bars(), config=values, activations=activations, device=device)
    if json:
        console.as_json({"run": str(found.path), "report": str(path)})
    else:
        console.say(f"report: {path}")


@app.command()
def demo(
    workers: Annotated[int, typer.Option(help="Processes that encode text.")] = 1,
    device: Device = "auto",
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """All four stages and a report on the embedded default: real text, a small real model, no network, two minutes."""
    import console
    from pipeline.demo import demo as stage

    result = stage(cache_root(cache), runs, console.Bars(), overrides=set_ or [], device=device, workers=workers)
    if json:
        console.as_json(result)
        return
    console.evaluation(result, result["run"])
    console.table("seconds", list(result["seconds"]), [list(result["seconds"].values())])
    console.say(f"report: {result['report']}")


@app.command("list")
def list_(runs: RunsRoot = Path("runs"), json: Json = False) -> None:
    """What there is to choose from: runs, architectures, codecs, sites, sources, presets."""
    import console
    from pipeline.choices import choices

    found = choices(runs)
    if json:
        console.as_json(found)
        return
    for title, entries in found.items():
        console.table(title, ["name", "what it is"], [[entry["name"], entry["help"]] for entry in entries])


@cache_app.command("ls")
def cache_ls(cache: CacheRoot = None, json: Json = False) -> None:
    """List the stores."""
    import console
    from cache import catalogue

    root = cache_root(cache)
    entries = [catalogue.entry(store) for store in catalogue.stores(root)]
    if json:
        console.as_json([entry.as_json() for entry in entries])
    elif not entries:
        console.say(f"{root}: no stores yet; `sae tokenize` makes the first")
    else:
        rows = [[e.key, e.kind, e.rows, console.size(e.bytes), "yes" if e.complete else "no"] for e in entries]
        console.table(str(root), ["key", "kind", "rows", "size", "complete"], rows)


StoreName = Annotated[str, typer.Argument(help="Key, the beginning of a key, or a path.")]


@cache_app.command("inspect")
def cache_inspect(store: StoreName, cache: CacheRoot = None, json: Json = False) -> None:
    """Everything about one store: recipe, arrays, windows, statistics."""
    import console
    from cache import catalogue

    found = catalogue.any_store(cache_root(cache), store)
    description = found.describe()
    if json:
        console.as_json({**catalogue.entry(found).as_json(), **description})
    else:
        console.table(found.key, ["", ""], [[name, console.compact(value)] for name, value in description.items()])


@cache_app.command("verify")
def cache_verify(
    store: Annotated[
        str | None, typer.Argument(help="Key, the beginning of a key, or a path. Default: every store.")
    ] = None,
    cache: CacheRoot = None,
    json: Json = False,
) -> None:
    """Check every file of a store against its checksum. Exit code 3 where something is damaged."""
    import console
    from cache import catalogue

    root = cache_root(cache)
    found = catalogue.stores(root) if store is None else [catalogue.any_store(root, store)]
    bars = console.Bars()
    damage: list[str] = []
    for one in found:
        names = [*one.metadata(), *one.committed_files()]
        bars.start(f"verify {one.key}", len(names), "files")
        for name in names:
            damage += filter(None, [one.damage(name)])
            bars.advance(1)
        bars.finish()
    if json:
        console.as_json({"stores": [one.key for one in found], "damage": damage})
    for line in [] if json else damage or [f"{len(found)} stores, every byte as committed"]:
        console.say(line)
    if damage:
        raise typer.Exit(3)


@cache_app.command("rm")
def cache_rm(
    stores: Annotated[list[str], typer.Argument(help="Keys, beginnings of keys, or paths.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache: CacheRoot = None,
    json: Json = False,
) -> None:
    """Remove stores. Asks first, unless `--yes`."""
    import console
    from cache import catalogue

    found = [catalogue.any_store(cache_root(cache), name) for name in stores]
    if not yes:
        sizes = ", ".join(f"{one.key} ({console.size(one.manifest.stored_bytes)})" for one in found)
        typer.confirm(f"Remove {sizes}?", abort=True, err=True)
    freed = {one.key: catalogue.remove(one) for one in found}
    if json:
        console.as_json({"removed": freed})
    for key, size in {} if json else freed.items():
        console.say(f"removed {key}, {console.size(size)}")


def show_stores(stores: "list[Store]", json: bool, extra: "dict[str, Callable[[Any], Any]]") -> None:
    """The stores a stage made: a table or JSON."""
    import console
    from cache import catalogue

    if json:
        listed = [{**catalogue.entry(s).as_json(), **{name: get(s) for name, get in extra.items()}} for s in stores]
        console.as_json({"stores": listed})
        return
    rows = [
        [s.key, s.n_rows, *(get(s) for get in extra.values()), console.size(s.manifest.stored_bytes)] for s in stores
    ]
    console.table("stores", ["key", "rows", *extra, "size"], rows)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sae {package_version('sae-cache')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `sae` command: runs it and turns every error into one line and an exit code."""
    import console

    try:
        app()
    except SaeError as error:
        console.complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.complain("interrupted; what was committed is safe, repeat the command to continue")
        sys.exit(Exit.INTERRUPTED)
    except Exception:  # noqa: BLE001 - the last resort: show it whole and say what to do
        traceback.print_exc()
        console.complain("this is a bug; please report the lines above with the command that caused them")
        sys.exit(Exit.BUG)


if __name__ == "__main__":
    main()
