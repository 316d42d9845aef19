"""`sae steer`: a latent of a dictionary is changed while its language model predicts and writes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, RunName, Said, TrainingStore, here_with, said_of
from sae.pipeline.commands.words import signed, whole

# One option a line: this is the manual.
# fmt: off
Feature = Annotated[int | None, typer.Option(metavar="N", help="The latent, from 0.")]
Strength = Annotated[str | None, typer.Option(metavar="X,...", help="How much it changes, in units (`--unit`): 4, or several as 0,1,2,-1.")]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="What the model reads.")]
Target = Annotated[str | None, typer.Option(metavar="TOKEN", help="A token whose log-probability after the prompt is watched, as \" the\".")]
Positions = Annotated[str | None, typer.Option(metavar="WHERE", show_default=False, help="Tokens whose activations change. all: of prompt and continuation, but for those that never become rows; last: from the prompt's last one on; 3 or 2-5: these, from 0. Default: all.")]
Topic = Annotated[Path | None, typer.Option(metavar="FILE", help="Text on a topic: the latents that tell it best are zeroed, in the place of steering one.")]
General = Annotated[Path | None, typer.Option(metavar="FILE", help="General text, which `--topic` is set against.")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")]
OWN = ("mode", "unit", "length", "temperature", "seed", "top")
# fmt: on
NAMED = 16  # latents of a topic that are named


def steer(
    *,
    run: Annotated[str | None, RunName] = None,
    feature: Feature = None, strength: Strength = None, prompt: Prompt = None, target: Target = None,
    positions: Positions = None, topic: Topic = None, general: General = None,
    said: Annotated[Said, said_of(*(f"steer.{name}" for name in OWN))],
    activations: TrainingStore = None, model: Model = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Change a latent while the language model reads and writes, and see what it predicts: beside what it does without.

    Shows the likeliest next tokens, the continuation, and what the change costs: KL to the model as it is, and the
    continuation's perplexity under it. A strength of 0 changes nothing, to the last bit. Several strengths leave a
    table and a plot in the run folder. With `--topic` and `--general` it asks instead whether zeroing the latents that
    tell a topic hurts the topic more than other text.

    Examples:

        sae steer --feature 123 --strength 4 --prompt "My favourite city is"
        sae steer topk-first --feature 123 --strength 0,1,2,4,8 --prompt "I think" --target " London" --json
        sae steer --feature 7 --mode ablate --prompt "Once upon" --positions 2-5
        sae steer --topic law.txt --general web.txt --top 1,4,16
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    asked = {"feature": feature, "strength": strength, "prompt": prompt, "target": target, "positions": positions}
    _expect_one_question(asked, topic, general, [name for name in OWN if f"steer.{name}" in said.options])
    strengths = signed("--strength", strength)
    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.steering.config import SteerConfig
        from sae.pipeline.steering.opened import opened

    flags = said.of("steer")
    if positions is not None:
        flags["positions"] = positions if positions in ("all", "last") else whole("--positions", positions)
    config = said.settings("steer", SteerConfig, flags=flags)
    here.progress.note(f"run: {found.path}")
    place = opened(
        found, here.cache, here.progress, activations=activations, model=model, device=here.device, offline=here.offline
    )
    if topic is not None and general is not None:
        from sae.pipeline.steering.topics import ablate_topic

        result = ablate_topic(place, topic.expanduser(), general.expanduser(), here.progress, config=config)
        console.as_json(result) if json else _show_topic(result)
        return
    assert feature is not None and prompt is not None
    from sae.pipeline.steering.stage import steer as stage
    from sae.pipeline.steering.stage import write

    steering = stage(place, feature, prompt, strengths, here.progress, config=config, target=target)
    files = write(steering, place) if len(steering.doses) > 1 else {}
    if json:
        console.as_json({**steering.as_json(), **files})
    else:
        _show(steering.as_json(), files)


def _expect_one_question(asked: dict[str, Any], topic: Path | None, general: Path | None, own: list[str]) -> None:
    """Raise SaeError unless a latent and a prompt are given, or two texts, and nothing of the other question."""
    if topic is None and general is None:
        for name, example in (("feature", "123"), ("prompt", '"Once upon a time"')):
            if asked[name] is None:
                raise SaeError(f"--{name}: is not given; say --{name} {example} (or --topic and --general)")
        if "top" in own:
            raise SaeError("--top: is of --topic and --general; leave it out")
        return
    for name, given, other in (("general", general, "topic"), ("topic", topic, "general")):
        if given is None:
            raise SaeError(f"--{other}: needs --{name} FILE as well: the one is set against the other")
    others = [name for name, value in asked.items() if value is not None] + [
        name for name in own if name not in ("top", "seed")
    ]
    if others:
        raise SaeError(
            f"--{others[0]}: steers one latent, --topic zeroes those that tell a topic; leave one of them out"
        )


def _show(told: dict[str, Any], files: dict[str, str]) -> None:
    """The model as it is beside what it does under the last strength; every continuation; what each strength costs."""
    from sae.pipeline.commands import console

    doses, unit = told["doses"], told["unit"]
    measure = {"max": f" x its largest activation ({console.short(unit['size'])})",
               "norm": f" x the site's mean norm ({console.short(unit['size'])})", "raw": ""}[unit["name"]]  # fmt: skip
    last = "" if told["mode"] == "ablate" else f" {doses[-1]['strength']:g}{measure}"
    where = told["positions"] if isinstance(told["positions"], str) else ",".join(map(str, told["positions"]))
    title = f"latent {told['feature']}: {told['mode']}{last}; positions: {where}"
    sides = zip(told["baseline"]["next"], told["steered"]["next"], strict=True)
    rows = [[_quoted(a["token"]), _percent(a), _quoted(b["token"]), _percent(b)] for a, b in sides]
    console.table(title, ["next, as it is", "chance", "steered", "chance"], rows)
    if told["baseline"]["tokens"] or any(dose["tokens"] for dose in doses):
        lines = [["as it is", told["baseline"]["text"]], *([_name(dose), dose["text"]] for dose in doses)]
        console.table("continuations", ["strength", "text"], lines, prose=True)
    costs = ("kl", "kl_continuation", "perplexity", "target", "target_change")
    every = [{**told["baseline"], "kl": 0.0}, *doses]
    shown = [name for name in costs if any(one.get(name) is not None for one in every)]
    cells = [
        [name, *(one.get(key) for key in shown)]
        for name, one in zip(["as it is", *map(_name, doses)], every, strict=True)
    ]
    console.table("what it costs", ["strength", *shown], cells)
    for what, path in files.items():
        console.say(f"{what}: {path}")


def _show_topic(told: dict[str, Any]) -> None:
    """What each number of latents costs the topic and general text, beside as many at random; which latents they are."""
    from sae.pipeline.commands import console

    rows = [
        [row["top"], which, *(row[f"{name}{end}"] for name in ("topic", "general", "selectivity"))]
        for row in told["ablations"] for which, end in (("best", ""), ("at random", "_control"))
    ]  # fmt: skip
    title = "cross-entropy added by zeroing latents, nats a token"
    console.table(title, ["latents", "which", "topic", "general", "selectivity"], rows)
    named = ", ".join(f"{one['feature']} ({one['auroc']:.3f})" for one in told["latents"][:NAMED])
    console.say(f"best at telling the topic, with their AUROC: {named}")


def _name(dose: dict[str, Any]) -> str:
    return f"{dose['strength']:g}"


def _quoted(token: str) -> str:
    return f'"{token}"'


def _percent(one: dict[str, Any]) -> str:
    return f"{100 * one['probability']:.2f} %"
