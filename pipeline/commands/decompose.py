"""`sae decompose`: weight matrices to components."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, Said, complete_run, complete_store, here_with, said_of
from sae.pipeline.commands.rows import Rows, announce
from sae.pipeline.commands.train import expect_name
from sae.pipeline.runtime.interrupts import remedied

if TYPE_CHECKING:
    from sae.cache.runs import Run
    from sae.pipeline.decompose.config import DecomposeConfig
    from sae.pipeline.decompose.opening import Opened


def decompose(
    *,
    live: Annotated[bool, typer.Option("--live", metavar="", help="Matrices of a language model that runs in every step, on tokens. Default: those of one MLP, on stores of what it read and gave.")] = False,
    toy: Annotated[bool, typer.Option("--toy", metavar="", help="Toy models of superposition, whose answer is known, trained first.")] = False,
    said: Annotated[Said, said_of(
        "decompose.matrices", "decompose.components", "decompose.importance", "decompose.lr", "decompose.batch",
        "decompose.steps", "decompose.seed", "decompose.features", "decompose.hidden", "decompose.identity",
    )],
    input_: Annotated[str | None, typer.Option("--input", metavar="STORE", autocompletion=complete_store, help="What the MLP read: a point as 6.mlp_in, or a store. Default: the only such point of the last harvest.")] = None,
    target: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="What it gave: a point as 6.mlp_out, or a store. Default: that beside what it read.")] = None,
    tokens_from: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Token store: key, beginning of a key, or path. Default: the last one made.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Language model: with `--live` a hub's name, a folder or tiny; else where it is now. Default: gpt2; where harvest found it.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=complete_run, help="Name of the run folder. Default: made from the settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", metavar="", help="Continue the run that `--name` says, or the one these settings made, from its last checkpoint; of a finished one, show its figures.")] = False,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Decompose weight matrices into rank-one components of which few matter at a time (SPD).

    Every matrix becomes a sum of components, and a small MLP says of each how important it is for a token. What is not
    important must not matter: it is masked at random. Then the model is judged with all components, with each as much as
    it is important, with those alone that are active, and with none.

    Examples:

        sae decompose --input 2.mlp_in --target 2.mlp_out --components 512
        sae decompose --live --model gpt2 --matrices 2.mlp.c_fc,2.mlp.c_proj --steps 5000
        sae decompose --toy --features 40 --hidden 10 --components 200 --importance 1e-4 --set decompose.p=2
        sae decompose --resume --name spd-first
    """
    kind = _kind(live, toy, input_, target, tokens_from, model)
    if name is not None:
        expect_name(name)
    if not live and not toy and (input_ or target) is not None:
        Rows.of(None, input_, target, None, None, {}).stores(
            here.cache
        )  # wrong names before the seconds that torch takes
    with here.loading_torch():
        from sae.pipeline.decompose import folder, opening
        from sae.pipeline.decompose.config import KINDS
        from sae.pipeline.decompose.stage import decompose as stage

    own = said or kind or (input_ or target or tokens_from) is not None
    if resume and name is not None and not own:
        from sae.cache import catalogue

        run = catalogue.find_decomposition(here.runs, name)
        opened = opening.again(run, here, model)
    else:
        flags = said.of("decompose")
        given = {"kind": kind} if kind else {}
        given |= {"model": model} if live and model is not None else {}
        config = said.settings("decompose", KINDS, flags={**flags, **given})
        opened = opened_of(config, here, input_, target, tokens_from, model)
        run = folder.open_run(opened.config, opened.about, here.runs, name, resume=resume)
    here.progress.note(f"run: {run.path}{'; nothing to do, it is finished' if run.finished else ''}")
    with remedied(f"continue with `sae decompose --resume --name {run.name}`"):
        found = stage(run, opened.config, opened.opener, here.progress)
    show(run, found, json)


def _kind(
    live: bool, toy: bool, source: str | None, target: str | None, tokens: str | None, model: str | None
) -> str | None:
    """What is decomposed, as far as options say it. Raises SaeError for those that do not go together."""
    stores = {"--input": source, "--target": target}
    if live and toy:
        raise SaeError("--live and --toy: are two things to decompose; give one of them")
    for option, value in (stores if live or toy else {}).items():
        if value is not None:
            raise SaeError(
                f"{option} {value}: is of one MLP on stores; leave it out, or {'--live' if live else '--toy'}"
            )
    if tokens is not None and not live:
        raise SaeError(f"--tokens-from {tokens}: tokens are read with --live; add it")
    if toy and model is not None:
        raise SaeError(f"--model {model}: toys are trained here; leave it out")
    return "live" if live else "toy" if toy else None


def opened_of(
    config: "DecomposeConfig", here: Here, source: str | None, target: str | None, tokens: str | None, model: str | None
) -> "Opened":
    """What a command line says is to be decomposed."""
    from sae.cache import catalogue
    from sae.cache.tokens import TokenStore
    from sae.pipeline.decompose import opening
    from sae.pipeline.decompose.config import LiveConfig, LocalConfig, ToyConfig

    if isinstance(config, ToyConfig):
        return opening.toy(config, here)
    if isinstance(config, LiveConfig):
        store = catalogue.find(here.cache, TokenStore, tokens)
        here.progress.note(f"tokens: {store.key}{catalogue.unfinished(store)}")
        return opening.live(config, store, here)
    assert isinstance(config, LocalConfig)
    (dataset,) = mlp_rows(here, source, target).datasets(here.cache, None)
    announce(dataset, here.progress)
    return opening.local(config, dataset, here, model)


def mlp_rows(here: Here, source: str | None, target: str | None) -> Rows:
    """The options that name what an MLP read and gave, where one or both were left out."""
    from sae.cache import catalogue, points
    from sae.cache.activations import ActivationStore

    if source is None:
        last = catalogue.latest(here.cache).get(ActivationStore.kind, [])
        found = [
            key
            for key in last
            if (of := points.point_of(catalogue.find(here.cache, ActivationStore, key))) and of[1] == "mlp_in"
        ]
        if len(found) != 1:
            what = "several stores" if found else "no store"
            raise SaeError(
                f"--input: the last harvest made {what} of what an MLP reads; say which, as --input 6.mlp_in"
            )
        source = found[0]
    if target is None:
        inputs, _ = Rows.of(None, source, None, None, None, {}).stores(here.cache)[0]
        of = points.point_of(inputs[0])
        if of is None or of[1] != "mlp_in" or len(inputs) > 1:
            raise SaeError(f"--input {source}: is not what an MLP reads; give one as 6.mlp_in")
        target = f"{of[0]}.mlp_out"
    return Rows.of(None, source, target, None, None, {})


def show(run: "Run", found: dict[str, Any], json: bool) -> None:
    """The figures of a decomposition, as tables or JSON."""
    from sae.pipeline.commands import console
    from sae.pipeline.decompose.plots import FILE

    if json:
        console.as_json({"run": run.name, **found, "files": {"plot": str(run.path / FILE)}})
        return
    masked = {name: each for name, each in found.items() if name in CONDITIONS}
    keys = [*dict.fromkeys(key for each in masked.values() for key in each)]
    rows = [[name, *(each.get(key) for key in keys), CONDITIONS[name]] for name, each in masked.items()]
    console.table(f"run {run.path}", ["components", *keys, "which"], rows)
    columns = ["ci_l0", "ci_l0_above_0", "alive", "faithfulness"]
    matrices = [[name, *(one[key] for key in columns)] for name, one in found["matrices"].items()]
    console.table("matrices", ["matrix", *columns], matrices)
    if "toy" in found:
        toy = found["toy"]
        shown = [[key, toy[key], toy.get(f"{key}_sd")] for key in ("mmcs", "ml2r", "one_hot", "exactly_one")]
        console.table("toys", ["figure", "mean", "deviation"], shown)
    console.say(f"plot: {run.path / FILE}")


CONDITIONS = {
    "itself": "the model itself",
    "unmasked": "all of them",
    "ci_masked": "each as much as it is important",
    "rounded": "those that are active",
    "stochastic": "masked at random, as in training",
    "nothing": "none",
}
