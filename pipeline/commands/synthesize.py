"""`sae synthesize`: rows that no language model computed, a command for each world they come from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, Said, expanded, here_with, said_of
from sae.pipeline.commands.shown import show_stores

if TYPE_CHECKING:
    from sae.pipeline.harvest.sources import RowSource, SourceConfig

USUAL = "features"
HELP = ("-h", "--help")
MOST_SHOWN = 12  # of numbers that are written out
Wait = Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")]


class Worlds(TyperGroup):
    """The worlds. Where none is named, that of `features` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        plain = not args or (args[0].startswith("-") and args[0] not in HELP)
        return super().parse_args(ctx, [USUAL, *args] if plain else args)


app = typer.Typer(
    cls=Worlds,
    help="Make a store of rows that no language model computed: of worlds whose truth is known, or anyone's. Without the "
    "name of a world, `features` is meant. `sae train`, `sae eval` and the studies take the rows up as a harvest's.",
)


@app.callback()
def group() -> None:
    pass


def features(
    *,
    said: Annotated[Said, said_of(
        "synthesize.rows", "synthesize.d", "synthesize.features", "synthesize.presence.mode", "synthesize.presence.groups",
        "synthesize.presence.active", "synthesize.presence.probability P", "synthesize.noise", "synthesize.seed",
        "synthesize.codec", of="SyntheticConfig",
    )],
    wait: Wait = False, here: Annotated[Here, here_with("cache")], json: Json = False,
) -> None:  # fmt: skip
    """Make rows whose true features are known, in the place of a language model's activations.

    A row is a sparse sum of random directions with coefficients between 0 and 1. `sae train` takes the rows up as it
    does a harvest's, and `sae eval` says how many of the directions a dictionary found. Held-out rows are made as well.
    An interrupted run continues where it was; a second call for more rows grows the same store.

    Examples:

        sae synthesize --preset synthetic
        sae synthesize features --rows 10M --d 64 --features 256 --active 4 --groups 8
        sae synthesize --mode iid --probability 0.02 --noise 0.01 --codec float32
        sae synthesize --set synthesize.presence.decay=0.9 --set synthesize.validation_rows=16384
    """
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig, SyntheticSource
    from sae.pipeline.harvest.sources.toy import ToyConfig

    _expect_an_end(said)
    kinds: list[type[SourceConfig]] = [SyntheticConfig, ToyConfig]
    values = said.settings("synthesize", kinds)
    if not isinstance(values, SyntheticConfig):
        raise SaeError(
            f"synthesize.source = {values.source}: these settings are of another world; `sae synthesize toy`"
        )
    _make(SyntheticSource(values), here, wait, json)


def toy(
    *,
    said: Annotated[Said, said_of(
        "synthesize.features", "synthesize.hidden", "synthesize.instances", "synthesize.probability P",
        "synthesize.last_probability P", "synthesize.last_importance", "synthesize.correlated_pairs",
        "synthesize.anticorrelated_pairs", "synthesize.correlation", "synthesize.schedule", "synthesize.steps",
        "synthesize.rows", "synthesize.seed", "synthesize.codec", of="ToyConfig",
    )],
    wait: Wait = False, here: Annotated[Here, here_with("cache")], json: Json = False,
) -> None:  # fmt: skip
    """Train toy models of superposition, and store their hidden states with the truth.

    Sparse features go through a linear map into fewer dimensions and come back through its transpose, a bias and a
    ReLU. The store has the toy's weights, the directions of its features, and the coefficients of every row. Several
    instances are trained side by side, each with a store of its own.

    Examples:

        sae synthesize toy --preset toy_5in2
        sae synthesize toy --features 5 --hidden 2 --probability 0.025
        sae synthesize toy --features 100 --hidden 20 --correlated-pairs 2 --anticorrelated-pairs 1 --schedule cosine
        sae synthesize toy --instances 10 --probability 1 --last-probability 0.05 --last-importance 0.01
        sae synthesize toy --features 4 --set synthesize.importance=[1,1,0.5,0.5]
    """
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
    from sae.pipeline.harvest.sources.toy import ToyConfig, ToySource
    from sae.pipeline.runtime.origins import Origins

    _expect_an_end(said)
    kinds: list[type[SourceConfig]] = [ToyConfig, SyntheticConfig]
    values = said.settings("synthesize", kinds)
    if not isinstance(values, ToyConfig):
        raise SaeError(f"synthesize.source = {values.source}: these settings are of another world; `sae synthesize`")
    _make(ToySource.of_settings(values, Origins(here.cache), here.progress), here, wait, json)


def rows(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows [n, d] of numbers: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv or Zarr.")],
    *,
    said: Annotated[Said, said_of("harvest.codec")],
    wait: Wait = False, here: Annotated[Here, here_with("cache")], json: Json = False,
) -> None:  # fmt: skip
    """Make anyone's rows a store, as `sae harvest --table FILE` does, and hold out a share of them.

    They are read twice and never held in memory; the same rows, in whatever format, are the same store. The settings
    are those of the section `harvest`: `validation`, `array`, `columns`, `train_rows`, `seed`.

    Examples:

        sae synthesize rows embeddings.parquet --codec float32
        sae synthesize rows image-features.npz --set harvest.array=layer4 --set harvest.validation=0.1
    """
    from sae.pipeline.harvest.sources import settings_of_sources
    from sae.pipeline.harvest.sources.table import TableConfig, TableSource
    from sae.pipeline.runtime.origins import Origins

    said.options.update({"harvest.source": TableSource.name, "harvest.table": file})
    values = said.settings("harvest", settings_of_sources())
    assert isinstance(values, TableConfig)
    _make(TableSource.of_settings(values, Origins(here.cache), here.progress), here, wait, json)


def series(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", show_default=False, help="Recordings [steps, channels]: .csv, .npz and whatever `rows` reads, .edf, .bdf, .set. Default: a series of known noise.")] = None,
    *,
    said: Annotated[Said, said_of(
        "harvest.window", "harvest.stride", "harvest.band LOW,HIGH", "harvest.rate HZ", "harvest.clip", "harvest.without",
        "harvest.split", "harvest.codec", of="SeriesConfig",
    )],
    wait: Wait = False, here: Annotated[Here, here_with("cache")], json: Json = False,
) -> None:  # fmt: skip
    """Make multivariate time series a store: a row is one step of all channels, or a window of several steps.

    Every channel is divided by its robust deviation, values far out are clipped (and said), and a band-pass that looks
    back only comes after. All of it is measured on training steps. Held out are whole recordings, or of one its end.
    EDF, BDF and EEGLAB files take `pip install sae-cache[eeg]`.

    Without FILE a series is made whose noise is known, and with it the store of what is without: `sae study denoise`
    says how much of the noise a dictionary takes away. The settings are those of the section `harvest`: `columns`,
    `validation`, `order`, `seed`, `noisy`.

    Examples:

        sae synthesize series eeg.csv --rate 128 --band 0.5,45 --without class
        sae synthesize series s1.edf s2.edf s3.edf --window 16
        sae synthesize series --set harvest.noisy.snr=3 --set harvest.noisy.channels=32
    """
    from sae.pipeline.harvest.sources import settings_of_sources
    from sae.pipeline.harvest.sources.series import SeriesConfig, SeriesSource
    from sae.pipeline.runtime.origins import Origins

    said.options["harvest.source"] = SeriesSource.name
    if files:
        said.options["harvest.recordings"] = files
    values = said.settings("harvest", settings_of_sources())
    assert isinstance(values, SeriesConfig)
    _make(SeriesSource.of_settings(values, Origins(here.cache), here.progress), here, wait, json)


for world in (features, toy, rows, series):
    app.command(world.__name__)(expanded(world))


def _expect_an_end(said: Said) -> None:
    if said.options.get("synthesize.rows") == "all":
        raise SaeError("--rows all: synthetic rows have no end; say how many, as 1M")


def _make(source: "RowSource", here: Here, wait: bool, json: bool) -> None:
    """Harvest a source, and show what came of it."""
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.harvest.stage import harvest

    result = harvest(source, here.cache, here.progress, wait=wait)
    stores = result.stores
    catalogue.remember(here.cache, "activations", [store.key for store in stores["train"]][: source.remembered])
    if not here.progress.worked:
        here.progress.note("nothing to do: the rows asked for were there already")
    first, every, about = stores["train"][0], [store for split in stores.values() for store in split], source.about()
    said = {"key": first.key, "rows": first.n_rows, "d": first.d, **about, **result.about()}
    show_stores(every, json, "width", lambda store: store.d, said)
    for name, value in about.items() if not json else ():
        console.say(f"{name.replace('_', ' ')}: {_shown(value)}")


def _shown(value: Any) -> str:
    """Numbers as a person reads them: of many, the least and the largest."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list) and len(value) > MOST_SHOWN:
        flat = [number for one in value for number in (one if isinstance(one, list) else [one])]
        return f"{_shown(min(flat))} to {_shown(max(flat))}"
    return " ".join(map(_shown, value)) if isinstance(value, list) else f"{value:.4g}"
