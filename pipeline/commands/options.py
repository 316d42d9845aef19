"""The options that commands share, and what comes of them: folders, settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import option

if TYPE_CHECKING:
    from sae.configs import Kind


def complete_preset() -> list[str]:
    """Presets, for the shell's completion."""
    from sae.configs import presets

    return presets()


def complete_store(context: typer.Context) -> list[str]:
    """Keys of stores, for the shell's completion."""
    return sorted(path.parent.name for path in cache_root(context.params.get("cache")).glob("*/*/recipe.json"))


def complete_run(context: typer.Context) -> list[str]:
    """Names of runs, for the shell's completion."""
    return sorted(path.parent.name for path in Path(context.params.get("runs") or "runs").glob("*/config.json"))


FILES = frozenset(  # endings that promise a file of some format, and so neither a folder nor a table of ours
    [
        ".arrow",
        ".bin",
        ".bz2",
        ".csv",
        ".feather",
        ".gz",
        ".h5",
        ".hdf5",
        ".html",
        ".json",
        ".jsonl",
        ".log",
        ".npy",
        ".npz",
        ".parquet",
        ".pdf",
        ".pickle",
        ".pkl",
        ".png",
        ".pt",
        ".pth",
        ".safetensors",
        ".sqlite",
        ".svg",
        ".tar",
        ".tgz",
        ".tsv",
        ".txt",
        ".xlsx",
        ".xz",
        ".yaml",
        ".yml",
        ".zip",
        ".zst",
    ]
)

# One option a line: this is the manual.
# fmt: off
SETTINGS, PLACES = "Settings", "Where"
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as JSON on stdout, and nothing else there.")]
Preset = Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=SETTINGS, autocompletion=complete_preset, help="Settings to start from: gpt2 (the defaults, written out) or tiny (embedded, offline).")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", rich_help_panel=SETTINGS, help="YAML file with a section a stage, on top of the preset; `configs/gpt2.yaml` shows every key.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", rich_help_panel=SETTINGS, help="One setting, as in `--set train.lr=3e-4`, on top of the file. Repeatable.")]
Device = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=PLACES, show_default=False, help="cpu, cuda, cuda:1, ... Default: auto, a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, envvar="SAE_THREADS", rich_help_panel=PLACES, help="Threads that compute on the CPU, shared by `--workers` and `--devices`. Default: the cores that nothing else keeps busy; resumed training takes as many as before.")]
CacheRoot = Annotated[str | None, typer.Option("--cache", metavar="DIR", envvar="SAE_CACHE", rich_help_panel=PLACES, help="Folder of the cache, or a URL as s3://bucket/prefix. Default: the platform's (on Linux `~/.cache/sae`).")]
RunsRoot = Annotated[Path, typer.Option("--runs", metavar="DIR", envvar="SAE_RUNS", rich_help_panel=PLACES, show_default=False, help="Folder of the runs. Default: `runs`, here.")]
Offline = Annotated[bool, typer.Option("--offline", metavar="", envvar="SAE_OFFLINE", rich_help_panel=PLACES, help="Never touch the network.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", metavar="ADDRESS", rich_help_panel=PLACES, help="Give the work to the workers of a dask scheduler, as tcp://host:8786, which all reach the cache.")]
Arch = Annotated[str | None, typer.Option(metavar="NAME", help="Architecture; `sae list` explains each. Default: topk.")]
ActiveLatents = Annotated[int | None, option("train.sae.k")]
Latents = Annotated[int | None, option("train.sae.d_sae")]
Steps = Annotated[int | None, option("train.steps")]
Seeds = Annotated[int | None, typer.Option(metavar="N", min=1, max=10_000, help="Train each with N seeds.")]
RunName = typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folder or its name. Default: the newest finished run.")
StoreName = Annotated[str, typer.Argument(metavar="STORE", autocompletion=complete_store, help="Key, the beginning of a key, or a path.")]
TrainingStore = Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activations it was trained on: key, beginning of a key, or path. Default: those the run names.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Remove without asking.")]
# fmt: on


def cache_root(given: str | None) -> Path:
    """The folder of the cache. Raises SaeError for a file, and for a URL that cannot be reached."""
    import platformdirs

    from sae.cache.disk.paths import expect_reachable, is_remote, parse_path

    found = parse_path(given or platformdirs.user_cache_dir("sae"))
    if is_remote(found):
        expect_reachable("cache", found)
        return found
    return folder("--cache", found)


def folder(option: str, path: Path) -> Path:
    """A folder that may not be there yet. Raises SaeError where something else is."""
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise SaeError(f"{option} {path}: is a file, not a folder; name another")
    if not path.exists() and path.suffix.lower() in FILES:
        raise SaeError(f"{option} {path}: would be a folder, and {path.suffix} is the name of a file; name another")
    return path


def as_csv_file(option: str, path: Path) -> Path:
    """A file for a table. Raises SaeError where its name promises another format."""
    if path.suffix.lower() in FILES and path.suffix.lower() != ".csv":
        raise SaeError(f"{option} {path}: is written as CSV, not as {path.suffix}; name a .csv file")
    return path.expanduser()


def length_of(steps: int | None, rows: str | None) -> tuple[list[str], dict[str, Any]]:
    """How long to train, by `--steps` and `--rows`: settings of presets and files that do not count, and flags.

    One of the two takes the place of what a preset says of the other; all the rows once is what neither says.
    """
    if steps is not None and rows is not None:
        raise SaeError(f"--steps {steps} and --rows {rows}: give one of them")
    freed = [other for given, other in ((steps, "rows"), (rows, "steps")) if given is not None]
    return freed, {"steps": steps, "rows": rows}


def team(workers: int | None, scheduler: str | None, usual: int) -> int:
    """How many processes are to work on this machine, where no scheduler says who works."""
    if workers is not None and scheduler is not None:
        raise SaeError(f"--workers {workers}: a scheduler brings its own workers; give --workers or --scheduler")
    return workers or usual


def settings(
    section: str,
    kind: "type[Kind] | Sequence[type[Kind]]",
    preset: str | None,
    file: Path | None,
    overrides: list[str] | None,
    /,
    *,
    axes: dict[str, Any] | None = None,
    freed: Sequence[str] = (),
    **flags: Any,
) -> "Kind":
    """The settings of a stage from everything the command line says; `axes` and `freed` are those of `resolve`."""
    from sae.configs import SECTIONS, resolve

    for item in overrides or ():
        if (other := item.partition(".")[0]) != section and other in SECTIONS:
            raise SaeError(f"--set {item}: `sae {section}` reads {section}.*; give this one to `sae {other}`")
    return resolve(
        section, kind, preset=preset, file=file, overrides=overrides or (), axes=axes, flags=flags, freed=freed
    )
