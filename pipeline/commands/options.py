"""The options that commands share, and the arguments that come of them.

A command is a function whose parameters are its options. Two of them may stand for several options each:

    def evaluate(
        *, said: Annotated[Said, said_of("eval.rows", "eval.tokens")], here: Annotated[Here, here_with("device", "cache")]
    ) -> None:

has the options `--rows`, `--tokens`, `--preset`, `--config`, `--set`, and `--device`, `--cache`: `expanded` puts them in
the place of the two. The command calls `said.settings("eval", EvalConfig)` for what they say together, and finds its
folders in `here`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import option
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.runtime.workplace import Workplace

if TYPE_CHECKING:
    from sae.configs import Kind
    from sae.pipeline.commands.bars import Bars


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


# endings that promise a file of some format, and so neither a folder nor a table of ours
FILES = {
    ".arrow", ".bin", ".bz2", ".csv", ".feather", ".gz", ".h5", ".hdf5", ".html", ".json", ".jsonl", ".log", ".npy",
    ".npz", ".parquet", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".sqlite", ".svg", ".tar",
    ".tgz", ".tsv", ".txt", ".xlsx", ".xz", ".yaml", ".yml", ".zip", ".zst",
}  # fmt: skip

# One option a line: this is the manual.
# fmt: off
SETTINGS, PLACES = "Settings", "Where"
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as JSON on stdout, and nothing else there.")]
Preset = Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=SETTINGS, autocompletion=complete_preset, help="Settings to start from: gpt2 (the defaults, written out), tiny (embedded, offline) or another that `sae list` explains.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", rich_help_panel=SETTINGS, help="YAML file with a section a stage, on top of the preset; `sae list --settings` shows every key.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", rich_help_panel=SETTINGS, help="One setting, as in `--set train.lr=3e-4`, on top of the file. Repeatable.")]
Device = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=PLACES, show_default=False, help="cpu, cuda, cuda:1, ... Default: auto, a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, envvar="SAE_THREADS", rich_help_panel=PLACES, help="Threads that compute on the CPU, and as many (2 to 16) that read ahead, shared by `--workers` and `--devices`. Default: the cores that nothing else keeps busy; resumed training computes with as many as before.")]
CacheRoot = Annotated[str | None, typer.Option("--cache", metavar="DIR", envvar="SAE_CACHE", rich_help_panel=PLACES, help="Folder of the cache, or a URL as s3://bucket/prefix. Default: the platform's (on Linux `~/.cache/sae`).")]
RunsRoot = Annotated[Path, typer.Option("--runs", metavar="DIR", envvar="SAE_RUNS", rich_help_panel=PLACES, show_default=False, help="Folder of the runs. Default: `runs`, here.")]
Offline = Annotated[bool, typer.Option("--offline", metavar="", envvar="SAE_OFFLINE", rich_help_panel=PLACES, help="Never touch the network.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", metavar="ADDRESS", rich_help_panel=PLACES, help="Give the work to the workers of a dask scheduler, as tcp://host:8786, which all reach the cache.")]
Seeds = Annotated[int | None, typer.Option(metavar="N", min=1, max=10_000, help="Train each with N seeds.")]
RunName = typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folder or its name. Default: the newest finished run.")
RunNames = typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folders or their names. Default: the newest finished run.")
StoreName = Annotated[str, typer.Argument(metavar="STORE", autocompletion=complete_store, help="Key, the beginning of a key, or a path.")]
TrainingStore = Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activations it was trained on: key, beginning of a key, or path. Default: those the run names.")]
ModelNow = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Where the language model is now. Default: where harvest found it.")]
NoCe = Annotated[bool, typer.Option("--no-ce", metavar="", help="Leave out cross-entropy: no language model is needed.")]
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


def team(workers: int | None, scheduler: str | None, usual: int) -> int:
    """Return how many processes are to work on this machine, where no scheduler says who works."""
    if workers is not None and scheduler is not None:
        raise SaeError(f"--workers {workers}: a scheduler brings its own workers; give --workers or --scheduler")
    return workers or usual


@dataclass(frozen=True)
class Said:
    """Settings as a command line says them: options by the paths of their settings, a preset, a file, and `--set`."""

    options: dict[str, Any]
    preset: str | None
    file: Path | None
    overrides: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.options or self.preset or self.file or self.overrides)

    def of(self, section: str) -> dict[str, Any]:
        """Return what options say of a section, as {"sae": {"k": 3}} of `train`."""
        found: dict[str, Any] = {}
        for path, value in self.options.items():
            first, *between, last = path.split(".")
            if first == section:
                place = found
                for key in between:
                    place = place.setdefault(key, {})
                place[last] = value
        return found

    def settings(self, section: str, kind: "type[Kind] | Sequence[type[Kind]]", **more: Any) -> "Kind":
        """Return the settings of a stage, of one class or of several that a tag tells apart; `more` goes to `resolve`.

        Raises SaeError for a `--set` that says something of another stage.
        """
        from sae.configs import SECTIONS

        for item in self.overrides:
            if (other := item.partition(".")[0]) != section and other in SECTIONS:
                raise SaeError(f"--set {item}: `sae {section}` reads {section}.*; give this one to `sae {other}`")
        return self.resolved(section, kind, **more)

    def resolved(self, section: str, kind: "type[Kind] | Sequence[type[Kind]]", **more: Any) -> "Kind":
        """Return the settings of one stage of several that a command carries out."""
        from sae.configs import resolve

        flags = more.pop("flags", self.of(section))
        return resolve(section, kind, preset=self.preset, file=self.file, overrides=self.overrides, flags=flags, **more)


@dataclass(frozen=True)
class Here(Workplace):
    """The workplace of a command, which is told in the terminal how far it is. threads: those that `--threads` says."""

    progress: "Bars"
    threads: int | None = None

    @contextmanager
    def loading_torch(self) -> Iterator[None]:
        """Say so where the imports inside take long, and compute with the threads asked for from then on."""
        with said_if_slow(self.progress, "loading torch"):
            yield
            from sae.pipeline.runtime import devices
        devices.take_threads(self.threads, self.progress.note)


class Group(NamedTuple):
    """Options that reach a command as one argument: their parameters, and what makes the argument of what was typed."""

    parameters: list[Parameter]
    made: Callable[[dict[str, Any]], Any]


def said_of(*settings: str, of: str | None = None) -> Group:
    """Declare an argument `Said`: the options of these settings, then `--preset`, `--config` and `--set`.

    of: the class that describes them first, where several have settings of the same path.
    """
    every = {setting.partition(" ")[0]: option(setting, of) for setting in settings}

    def made(typed: dict[str, Any]) -> Said:
        read = {path: one.read(typed[one.parameter.name]) for path, one in every.items()}
        options = {path: value for path, value in read.items() if value is not None}
        return Said(options, typed["preset"], typed["config"], typed["set_"] or ())

    return Group([*(one.parameter for one in every.values()), *map(_shared, ("preset", "config", "set_"))], made)


def here_with(*names: str) -> Group:
    """Declare an argument `Here` of some of `--device`, `--threads`, `--cache`, `--runs` and `--offline`."""

    def made(typed: dict[str, Any]) -> Here:
        from sae.pipeline.commands.bars import Bars

        given = {name: typed[name] for name in names}
        cache = cache_root(given.pop("cache")) if "cache" in given else Path()
        runs = folder("--runs", given.pop("runs")) if "runs" in given else Path()
        return Here(cache, runs, Bars(), **given)

    return Group(list(map(_shared, names)), made)


SHARED: dict[str, tuple[Any, Any]] = {
    "preset": (Preset, None), "config": (ConfigFile, None), "set_": (Set, None), "device": (Device, "auto"),
    "threads": (Threads, None), "cache": (CacheRoot, None), "runs": (RunsRoot, Path("runs")), "offline": (Offline, False),
}  # fmt: skip


def _shared(name: str) -> Parameter:
    kind, default = SHARED[name]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command as typer takes it: with the options of its groups in the place of the arguments they make."""
    arguments = inspect.signature(command).parameters
    said = {name: getattr(one.annotation, "__metadata__", ()) for name, one in arguments.items()}
    groups = {name: one for name, found in said.items() for one in found if isinstance(one, Group)}

    def typed(**given: Any) -> None:
        command(**{name: groups[name].made(given) if name in groups else given[name] for name in arguments})

    every = [groups[name].parameters if name in groups else [one] for name, one in arguments.items()]
    typed.__signature__ = inspect.Signature([parameter for each in every for parameter in each])  # type: ignore[attr-defined]
    typed.__doc__ = command.__doc__
    return typed
