"""`sae export`: runs to a folder that another tool opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.commands.options import Here, Json, complete_run, folder, here_with

if TYPE_CHECKING:
    from sae.cache.runs import Run

NEURONPEDIA = "neuronpedia"
CHARACTERS = 60  # of the names of runs in that of a folder


def run_or_folder(root: Path, name: str | None) -> "Run | Path":
    """The run that a name means, or another tool's folder; without a name, the newest finished run."""
    from sae.cache import catalogue

    try:
        return catalogue.find_run(root, name)
    except NotFound:
        if name is not None and (path := Path(name).expanduser()).exists():
            return path
        raise


def export(
    *,
    exported: Annotated[list[str] | None, typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folder or its name, or another tool's folder; several where the format keeps sets. Default: the newest finished run.")] = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", show_default=False, help="saelens, dictionary_learning, sparsify, openmoss, circuit-tracer (`sae list` explains each), or neuronpedia: the latents that `sae report` looked up.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", show_default=False, help="Folder to make. Default: RUN-FORMAT, here.")] = None,
    model_name: Annotated[str | None, typer.Option(metavar="NAME", show_default=False, help="What the other tool calls the language model, as gpt2 or owner/name. Default: as the run says.")] = None,
    here: Annotated[Here, here_with("runs")], json: Json = False,
) -> None:  # fmt: skip
    """Write trained dictionaries as another tool opens them: the function they compute, and where they belong.

    What a tool has no words for is one line and no folder. circuit-tracer takes a transcoder for every layer at once;
    neuronpedia takes the pages of latents (batch-N.json), as its converter reads them.

    Examples:

        sae export --to saelens
        sae export my-run --to dictionary_learning --out learned --model-name EleutherAI/pythia-70m
        sae export layer-0 layer-1 layer-2 --to circuit-tracer --out transcoders
        sae export my-run --to neuronpedia --model-name gpt2-small
    """
    from sae.cache.provenance import LanguageModelRows, provenance
    from sae.pipeline.commands import console

    names: list[str | None] = [*dict.fromkeys(exported or ())] or [None]
    found = [run_or_folder(here.runs, name) for name in names]
    with here.loading_torch():
        from sae.pipeline import formats
        from sae.pipeline.formats.trained import load_latents

    name = "+".join(one.name for one in found)[:CHARACTERS]
    where = folder("--out", out or Path(f"{name}-{to}"))
    said = {"path": str(where.absolute()), "format": to, "runs": [one.name for one in found]}
    if to == NEURONPEDIA:
        run = found[0]
        if len(found) > 1 or isinstance(run, Path):
            raise SaeError(f"--to {to}: takes the pages of one run; name one")
        from sae.pipeline.report.neuronpedia import write

        files = write(run, where, model_name)
        if json:
            console.as_json({**said, "files": [file.name for file in files]})
        else:
            console.say(f"{to}: {where}, {len(files)} file{'s' * (len(files) > 1)}")
        return
    parts = []
    for one in found:
        dictionary = formats.read(one).dictionary if isinstance(one, Path) else load_latents(one)
        metadata = dictionary.metadata
        if model_name is not None:
            metadata = metadata._replace(model=model_name)
        elif not isinstance(one, Path) and one.imported is None:
            recipe = one.seen.inputs[0].recipe
            if isinstance(provenance(recipe), LanguageModelRows) and recipe["model"].get("revision") is None:
                here.progress.note(
                    f"model: {metadata.model} is what a folder is called; --model-name says what others call it"
                )
        parts.append((dictionary, metadata))
    formats.write_set(parts, where, to)
    if json:
        console.as_json(said)
    else:
        console.say(f"{to}: {where}")
