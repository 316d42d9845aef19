"""Which module may import which: the arrows of the design, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE = ("cli", "commands")
OURS = ("cache", "configs", "pipeline", "console", *COMMAND_LINE)
STAGES = (
    "pipeline.tokenize", "pipeline.harvest", "pipeline.synthesize", "pipeline.train", "pipeline.evaluate",
)  # fmt: skip
# what lists everything there is, what runs all of it, what runs one stage many times, and what makes things again
OVERVIEWS = (
    "pipeline.choices", "pipeline.demo", "pipeline.sweep", "pipeline.repair",
    *(f"pipeline.studies.{path.stem}" for path in (ROOT / "pipeline" / "studies").glob("[a-z]*.py")),
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    paths = [path for name in OURS for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if path.exists()]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Dotted names a module imports, wherever in it, relative ones resolved; `from a import b` is a.b where that is."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


IMPORTS = {name: sorted(set(imports(name))) for name in MODULES}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(name: str) -> list[str]:
    return [imported for imported in IMPORTS[name] if inside(imported, *OURS)]


def others(name: str) -> set[str]:
    """Packages that are neither ours nor Python's."""
    found = {imported.partition(".")[0] for imported in IMPORTS[name]}
    return found - set(OURS) - sys.stdlib_module_names


def reached(name: str) -> set[str]:
    """Everything of ours a module leads to."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for imported in ours(waiting.pop()):
            if imported not in seen:
                seen.add(imported)
                waiting.append(imported)
    return seen


def within(package: str) -> list[str]:
    return [name for name in MODULES if inside(name, package)]


def test_there_is_something_to_look_at() -> None:
    assert set(STAGES) <= set(MODULES)
    assert "cache.activations" in IMPORTS["pipeline.harvest"]
    assert "pipeline.saes.config" in IMPORTS["pipeline.saes"]
    assert "cache.catalogue" in IMPORTS["commands.runs"]
    assert all(imported in MODULES for name in MODULES for imported in ours(name))


# package -> what of ours it may import, and which packages of others (None: any)
ARROWS: dict[str, tuple[tuple[str, ...], set[str] | None]] = {
    "cache": (("cache",), {"numpy", "numcodecs", "google_crc32c", "safetensors", "torch", "upath", "zarr"}),
    "configs": (("configs", "cache.errors"), {"pydantic", "yaml"}),
    "console": (("cache.printable", "pipeline.metrics.figures"), {"rich"}),
    "pipeline.saes": (("pipeline.saes", "configs.base"), {"torch", "pydantic"}),
    "pipeline.formats": (
        (
            "pipeline.formats", "pipeline.saes.inference", "pipeline.saes.latents", "pipeline.saes.dictionary",
            "cache.errors", "cache.durable", "cache.parsing", "cache.tensors",
        ), {"torch"},
    ),
    "pipeline.metrics": (("pipeline.metrics", "pipeline.saes"), {"torch", "numpy", "scipy"}),
    "pipeline.sources": (("pipeline.sources", "pipeline.network", "cache.errors"), None),
    "pipeline.language_model": (
        ("pipeline.language_model", "pipeline.network", "pipeline.embedded", "pipeline.devices", "cache.errors"), None,
    ),
    "commands": (("cache", "configs", "console", "pipeline", "commands"), {"typer", "platformdirs"}),
    "commands.options": (
        ("cache.errors", "cache.places", "cache.store", "configs", "commands.options"), {"typer", "platformdirs"},
    ),
    "commands.upkeep": (("cache", "console", "pipeline.repair", "commands.options", "commands.upkeep"), {"typer"}),
    "cli": (("commands.app", "pipeline.interrupts"), set()),
}  # fmt: skip


@pytest.mark.parametrize("package", ARROWS)
def test_the_arrows(package: str) -> None:
    allowed, outside = ARROWS[package]
    assert within(package)
    wrong = [(name, target) for name in within(package) for target in ours(name) if not inside(target, *allowed)]
    assert wrong == []
    if outside is not None:
        assert {name: others(name) - outside for name in within(package) if others(name) - outside} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_lead_to_each_other(stage: str) -> None:
    assert reached(stage) & (set(STAGES) - {stage}) == set()


def test_nothing_below_a_stage_imports_one() -> None:
    wrong = [
        (name, target)
        for name in within("pipeline")
        for target in ours(name)
        if target in STAGES and name not in OVERVIEWS
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "whose"),
    [
        ("cache.loading", ("cache.loader", "cache.upkeep", "commands.looking")),  # which shows shuffle quality
        ("cache.upkeep", ("commands.looking", "commands.upkeep", "pipeline.repair")),
        ("pipeline.text", ("pipeline.tokenize", "pipeline.matching", "pipeline.repair", "pipeline.choices")),
        (
            "pipeline.training",
            ("pipeline.train", "pipeline.sweep", "pipeline.studies", "commands.runs", "commands.studies"),
        ),
    ],
)
def test_parts_are_used_by_what_they_are_parts_of(package: str, whose: tuple[str, ...]) -> None:
    wrong = [
        (name, target)
        for name in MODULES
        for target in ours(name)
        if inside(target, package) and not inside(name, package, *whose)
    ]
    assert wrong == []


def test_the_pipeline_knows_no_presets_and_no_terminal() -> None:
    for name in within("pipeline"):
        assert name in OVERVIEWS or "configs" not in IMPORTS[name], name
        assert not others(name) & {"typer", "rich", "click"}, name


def test_only_the_command_line_is_above() -> None:
    above = [(name, target) for name in MODULES for target in ours(name) if inside(target, *COMMAND_LINE, "console")]
    assert {name for name, _ in above if not inside(name, *COMMAND_LINE)} == set()


def test_the_language_model_is_behind_one_door() -> None:
    for name in MODULES:
        if "transformer_lens" in others(name):
            assert inside(name, "pipeline.language_model"), name
        if "transformers" in others(name):
            assert inside(name, "pipeline.language_model", "pipeline.text"), name


@pytest.mark.parametrize("stage", ["pipeline.tokenize", "pipeline.train"])
def test_whoever_has_the_cache_needs_no_language_model(stage: str) -> None:
    assert not [name for name in reached(stage) if inside(name, "pipeline.language_model")]


def test_dictionaries_know_no_paths_and_no_json() -> None:
    for package in ("pipeline.saes", "pipeline.metrics"):
        for name in within(package):
            assert not {"json", "os", "pathlib", "io", "pickle"} & set(IMPORTS[name]), name


def test_nothing_is_pickled() -> None:
    for name in MODULES:
        assert not {"pickle", "shelve", "dill", "joblib", "cloudpickle"} & set(IMPORTS[name]), name
