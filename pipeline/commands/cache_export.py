"""`sae cache export`: activations for tools that know nothing of the cache."""

from pathlib import Path
from typing import Annotated

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import CacheRoot, Json, StoreName, cache_root, folder
from sae.pipeline.commands.words import count


def export(
    store: StoreName,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make. It must not be there yet.")],
    format_: Annotated[str, typer.Option("--format", metavar="NAME", show_default=False, help="zarr; npy or safetensors (shards that can be mapped); parquet; arrow (a Hugging Face dataset as SAELens trains from it). Default: zarr.")] = "zarr",
    dtype: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="float32, float16, or bfloat16 (zarr, as the uint16 of its bits, and safetensors). Default: float32.")] = "float32",
    rows: Annotated[str, count("Rows to write, from the first on. Default: all.")] = "all",
    order: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="stored: shuffled, as training reads them; token: as they stand in the text. Default: stored.")] = "stored",
    with_tokens: Annotated[bool, typer.Option("--with-tokens", metavar="", help="Write the tokens as well that the rows came from: whole contexts into Zarr, else one beside each row.")] = False,
    cache: CacheRoot = None, json: Json = False,
) -> None:  # fmt: skip
    """Write activations as plain floats, for tools that know nothing of this cache.

    DEST gets `rows` [N, d] and `position` [N] (context times context length plus place in it), with `--with-tokens` the
    tokens, and the recipe. It appears when it is whole.

    Examples:

        sae cache export gpt2-6.mlp_out mlp_out.zarr
        sae cache export gpt2-6.mlp_out shards --format npy --dtype float16
        sae cache export gpt2-6.mlp_out for-saelens --format arrow
        sae cache export gpt2-6.mlp_out first.zarr --rows 1M --order token --with-tokens --dtype float16
    """
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore
    from sae.cache.tokens import TokenStore
    from sae.pipeline.commands import console
    from sae.pipeline.commands.bars import Bars

    root, bars, destination = cache_root(cache), Bars(), folder("DEST", destination)
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
        made = writing.export(
            found, destination, bars.advance, dtype=dtype, rows=n, order=order, tokens=tokens, format=format_
        )
    finally:
        bars.finish()
    if json:
        result = {"path": str(made.path), "store": found.key, "rows": made.rows, "bytes": made.bytes}
        console.as_json({**result, "format": format_, "dtype": dtype, "order": order})
    else:
        console.say(f"{made.path}: {made.rows:,} rows of {found.key} as {dtype}, {console.size(made.bytes)}")
