"""`sae show`: one latent, or the latents of a text, in the terminal."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, RunName, TrainingStore, here_with

if TYPE_CHECKING:
    from sae.cache.runs import Run
    from sae.pipeline.interpret.examples import Example, Feature, TokenWeight
    from sae.pipeline.interpret.explanations import Explained
    from sae.pipeline.interpret.statistics import Statistics

# One option a line: this is the manual.
# fmt: off
Feature_ = Annotated[int | None, typer.Option("--feature", metavar="N", help="The latent, from 0.")]
Words = Annotated[str | None, typer.Option("--text", metavar="TEXT", help="A text: which latents fire on it, token by token.")]
Top = Annotated[int | None, typer.Option(metavar="N", min=1, max=10_000, show_default=False, help="Latents of a token of `--text` that are named. Default: 5.")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model that reads `--text` is now. Default: where harvest found it.")]
# fmt: on
BAR = 30  # letters of the longest bar of a histogram
ABOUT = 3  # tokens that say what a latent is about
USUAL_TOP = 5  # latents of a token that are named
NAMED = 12  # latents of a text that are described


def show(
    *,
    run: Annotated[str | None, RunName] = None,
    feature: Feature_ = None, text: Words = None, top: Top = None,
    activations: TrainingStore = None, model: Model = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Look at one latent, or at the latents that fire on a text.

    A latent: how often and how strongly it fires, on what text, which tokens it makes likelier, which latents are like
    it. What is known of all latents is gathered once, into the run folder, and no language model runs. A text is read
    by the language model.

    Examples:

        sae show --feature 123
        sae show l1-first --text "The cat sat on the mat." --top 3
        sae show l1-first --feature 123 --json
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    if (feature is None) == (text is None):
        both = "--text: is of all latents, --feature of one" if text is not None else "--feature: is not given"
        raise SaeError(f"{both}; say --feature 123, or --text and some words")
    for option, value in {"--top": top, "--model": model}.items() if text is None else ():
        if value is not None:
            raise SaeError(f"{option} {value}: is of --text; leave it out")
    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.formats.trained import load_latents
        from sae.pipeline.interpret.stage import statistics_of

    here.progress.note(f"run: {found.path}")
    if feature is not None:
        width = load_latents(found).d_sae
        if not 0 <= feature < width:
            raise SaeError(f"--feature {feature}: {found.name} has latents 0 to {width - 1}; give one of these")
        known = statistics_of(found, here.cache, here.progress, activations=activations, device=here.device)
        one = known.feature(feature)
        if json:
            console.as_json(_as_json(found, known, one))
        else:
            _show_feature(found, known, one)
        return
    assert text is not None
    from sae.pipeline.steering.opened import opened
    from sae.pipeline.steering.texts import fired_on

    place = opened(
        found, here.cache, here.progress, activations=activations, model=model, device=here.device, offline=here.offline
    )
    rows = fired_on(place, text, top or USUAL_TOP)
    about = _about(found, sorted({one["feature"] for row in rows for one in row["latents"]}))
    if json:
        console.as_json({"run": str(found.path), "text": text, "tokens": rows, "about": about})
    else:
        _show_text(rows, about, place.vocabulary)


def _explained(run: "Run") -> "dict[int, Explained]":
    """What `sae explain` found of latents that it found words for."""
    from sae.pipeline.interpret.explanations import explanations

    kept = explanations(run)
    return {} if kept is None else {one.feature: one for one in kept.features if one.explanation is not None}


def _as_json(run: "Run", known: "Statistics", one: "Feature") -> dict[str, Any]:
    """Everything about a latent; `vocabulary` has the text of every token that is mentioned."""
    told = one.model_dump(mode="json", by_alias=True)
    examples = [*one.top, *(example for band in one.bands for example in band.examples)]
    tokens = {token for example in examples for token in example.tokens}
    tokens |= {entry.token for entry in one.frequent} | {entry.token for entry in [*one.promoted, *one.suppressed]}
    words = {token: known.text(token).decode(errors="replace") for token in sorted(tokens)}
    words_for = _explained(run).get(one.latent)
    told["explanation"] = None if words_for is None else words_for.model_dump(mode="json")
    return {"run": str(run.path), "rows": known.rows, **told, "vocabulary": words}


def _show_feature(run: "Run", known: "Statistics", one: "Feature") -> None:
    from sae.pipeline.commands import console
    from sae.pipeline.runtime.sparks import bar, sparkline

    plain = console.out.options.ascii_only
    console.say(f"latent {one.latent} of {run.name}")
    if not one.fired:
        console.say(f"fires in none of {known.rows:,} rows")
    else:
        course = sparkline(one.rates, plain=plain)
        console.say(
            f"fires in {_percent(one.density)} of {known.rows:,} rows  {course}  largest {one.max:.4g}, mean {one.mean:.4g}"
        )
    if (explained := _explained(run).get(one.latent)) is not None:
        score = "" if explained.score is None else f" (score {explained.score:.2f}, by {explained.backend})"
        console.say(f"explanation: {explained.explanation}{score}")
    most = max((b.count for b in one.histogram), default=0)
    rows = [[f"{b.low:.3g} to {b.high:.3g}", b.count, bar(b.count / most, BAR, plain=plain)] for b in one.histogram]
    if rows:
        console.table("activations", ["from", "rows", ""], rows)
    _show_contexts("strongest, one a document", one.top, one, known)
    for band in one.bands:
        _show_contexts(
            f"between {100 * band.low:.0f} and {100 * band.high:.0f} % of its activations", band.examples, one, known
        )
    if one.frequent:
        listed = "  ".join(f"{_word(known, e.token)} {100 * e.count / one.sampled:.0f} %" for e in one.frequent)
        console.say(f"fires on: {listed}")
    for what, entries in (("makes likelier", one.promoted), ("makes less likely", one.suppressed)):
        if entries:
            console.say(f"{what}: {_weights(known, entries)}")
    if one.nearest:
        console.say("nearest: " + "  ".join(f"{near.latent} (cosine {near.cosine:.2f})" for near in one.nearest))
    if one.partners:
        console.say(
            "fires with: " + "  ".join(f"{other.latent} (Jaccard {other.jaccard:.2f})" for other in one.partners)
        )


def _show_contexts(title: str, examples: "list[Example]", one: "Feature", known: "Statistics") -> None:
    """Passages of text, the token that fired marked."""
    from sae.pipeline.commands import console
    from sae.pipeline.commands.passages import passage, say

    told = [example for example in examples if example.tokens]  # of rows that come from no text there is none
    if not told:
        return
    console.say(f"{title}:")
    width = max(len(f"{example.value:.4g}") for example in told)
    for example in told:
        words = [known.text(token) for token in example.tokens]
        say(f"  {f'{example.value:.4g}':>{width}}  ", passage(words, example.activations, example.peak, one.max))


def _show_text(rows: list[dict[str, Any]], about: dict[int, str], vocabulary: list[bytes]) -> None:
    """A line a token, then what the strongest latents are about."""
    from sae.pipeline.commands import console
    from sae.pipeline.commands.passages import spelled

    words = spelled([vocabulary[row["id"]] if row["id"] < len(vocabulary) else b"" for row in rows])
    lines = [
        [row["position"], f'"{word}"', row["fired"], "  ".join(_value(one) for one in row["latents"]) or "-"]
        for row, word in zip(rows, words, strict=True)
    ]
    console.table("latents of the text, strongest first", ["", "token", "fire", "latent (value)"], lines, prose=True)
    if not all(row["learned"] for row in rows):
        left = ", ".join(str(row["position"]) for row in rows if not row["learned"])
        console.say(f"the dictionary has not learned of tokens such as those at {left}")
    most: dict[int, float] = {}
    for row in rows:
        for one in row["latents"] if row["learned"] else ():
            most[one["feature"]] = max(most.get(one["feature"], 0.0), abs(one["value"]))
    named = [one for one in sorted(most, key=lambda feature: -most[feature]) if one in about][:NAMED]
    if named:
        console.table("what they are about", ["latent", ""], [[one, about[one]] for one in named], prose=True)
    elif most:
        console.note("what latents are about is known once `sae show --feature N` or `sae report` has gathered it")


def _about(run: "Run", features: list[int]) -> dict[int, str]:
    """What latents are about, of those of which something is known: words, else the tokens that they fire on most."""
    from sae.pipeline.interpret.statistics import Statistics

    found = {}
    if (known := Statistics.read(run)) is not None:
        told = {one: known.feature(one) for one in features if one < known.d_sae}
        found = {
            one: "fires on " + ", ".join(_word(known, entry.token) for entry in feature.frequent[:ABOUT])
            for one, feature in told.items() if feature.frequent
        }  # fmt: skip
    words = {one: str(said.explanation) for one, said in _explained(run).items() if one in features}
    return found | words


def _word(known: "Statistics", token: int) -> str:
    from sae.pipeline.commands.passages import quoted

    return quoted(known.text(token))


def _weights(known: "Statistics", entries: "list[TokenWeight]") -> str:
    return "  ".join(f"{_word(known, entry.token)} {entry.weight:+.3g}" for entry in entries)


def _value(one: dict[str, Any]) -> str:
    return f"{one['feature']} ({one['value']:.3g})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
