"""The map of the code (docs/architecture.md) against the tree: which rooms there are, and which imports which."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "docs" / "architecture.md"
STAGES = ("pipeline.tokenize", "pipeline.harvest", "pipeline.train", "pipeline.evaluate")
TOPS = ("cache", "configs", "pipeline")


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    paths = [path for top in TOPS for path in (ROOT / top).rglob("*.py")]
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    door = {path.stem.replace("__init__", ""): path for path in (ROOT / "sae").glob("*.py") if not path.is_symlink()}
    own = {"cli": ROOT / "cli.py", **door}
    return {f"sae.{name}".rstrip("."): path for name, path in {**found, **own}.items() if name != "pipeline"}


MODULES = modules()


def statements(block: ast.AST) -> Iterator[ast.AST]:
    """Every statement in a block, however deep, and nothing of what they are made of."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for one in getattr(block, part, ()):
            yield one
            yield from statements(one)


def imports(name: str) -> Iterator[str]:
    """Dotted names a module imports, wherever in it, relative ones resolved; `from a import b` is a.b where that is."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


IMPORTS = {name: sorted(set(imports(name))) for name in MODULES}


def room(name: str) -> str:
    """The room of a module: its folder below the root, no deeper than two; `errors` is a room of its own."""
    path = MODULES[name].relative_to(ROOT)
    if str(path) == "cache/errors.py":
        return "cache.errors"
    return ".".join(path.parent.parts[:2]) or path.stem


def ours(name: str) -> list[str]:
    return [imported for imported in IMPORTS[name] if imported.partition(".")[0] == "sae"]


def others(name: str) -> set[str]:
    """Packages that are neither ours nor Python's."""
    return {imported.partition(".")[0] for imported in IMPORTS[name]} - {"sae"} - sys.stdlib_module_names


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from, as the tree has it."""
    found: dict[str, set[str]] = {room(name): set() for name in MODULES}
    for name in MODULES:
        found[room(name)] |= {room(imported) for imported in ours(name)} - {room(name)}
    return found


def table() -> dict[str, set[str]]:
    """The same as the map has it, in the map's order."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.*?) \|$", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: set(re.findall(r"`([\w.]+)`", listed)) for name, _, listed in rows}


def reached(start: str) -> set[str]:
    """Every room that a room leads to."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in ARROWS[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


ARROWS = arrows()
TABLE = table()


def test_the_map_has_every_room_and_no_other() -> None:
    assert len(TABLE) > 15
    assert set(TABLE) == set(ARROWS)
    assert all(imported in MODULES for name in MODULES for imported in ours(name))


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_the_arrows_are_those_of_the_map(name: str) -> None:
    wrong = {
        target: [(module, imported) for module in MODULES if room(module) == name
                 for imported in ours(module) if room(imported) == target]
        for target in ARROWS[name] - TABLE.get(name, set())
    }  # fmt: skip
    assert wrong == {}, "an import that the map does not have"
    assert TABLE[name] - ARROWS[name] == set(), "the map has an arrow that nothing needs"


def test_arrows_point_one_way() -> None:
    """Each room imports only from rooms that stand above it."""
    order = list(TABLE)
    assert [
        (name, target) for name in order for target in ARROWS[name] if order.index(target) >= order.index(name)
    ] == []


def test_pipeline_has_no_loose_files() -> None:
    assert [path.name for path in (ROOT / "pipeline").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_lead_to_each_other_through_the_cache_alone(stage: str) -> None:
    for name in MODULES:
        if room(name) == stage:
            meets = [target for target in ours(name) if room(target) in STAGES and room(target) != stage]
            assert meets == [], (name, meets)


def test_the_library_knows_no_terminal() -> None:
    for name in MODULES:
        if room(name) != "pipeline.commands":
            assert not others(name) & {"typer", "rich", "click"}, name


def test_the_cache_is_about_nothing_but_disk() -> None:
    allowed = {"numpy", "numcodecs", "google_crc32c", "safetensors", "torch", "upath", "zarr"}
    formats = {"datasets", "pyarrow"}  # of files that other tools read
    found = {
        name: others(name) - allowed - (formats if room(name) == "cache.exports" else set())
        for name in MODULES
        if name.startswith("sae.cache")
    }
    assert {name: more for name, more in found.items() if more} == {}


def test_the_language_model_is_behind_one_door() -> None:
    for name in MODULES:
        if "transformer_lens" in others(name):
            assert room(name) == "pipeline.language_model", name
        if "transformers" in others(name):
            assert room(name) in ("pipeline.language_model", "pipeline.tokenizers"), name


@pytest.mark.parametrize("stage", ["pipeline.train"])
def test_whoever_has_the_cache_needs_no_language_model(stage: str) -> None:
    assert "pipeline.language_model" not in reached(stage)


def test_dictionaries_know_no_paths_and_no_json() -> None:
    for name in MODULES:
        if room(name) in ("pipeline.saes", "pipeline.metrics"):
            assert not {"json", "os", "pathlib", "io", "pickle"} & set(IMPORTS[name]), name


def test_nothing_is_pickled() -> None:
    for name in MODULES:
        assert not {"pickle", "shelve", "dill", "joblib", "cloudpickle"} & set(IMPORTS[name]), name


def test_no_module_has_two_names() -> None:
    """Nothing imports `cache`, `pipeline`, `configs` or `cli` as a top-level name; a user's own would be taken."""
    for name in MODULES:
        assert not {imported.partition(".")[0] for imported in IMPORTS[name]} & {*TOPS, "cli", "console"}, name


def test_every_package_that_is_imported_is_asked_for() -> None:
    """By its own name, in the dependencies or an extra: what another package brings along may be gone with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: listed for name, listed in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    asked = {re.split(r"[^\w-]", one)[0] for one in [*project["dependencies"], *chain(*extras.values())]}
    names = {"yaml": "pyyaml", "upath": "universal-pathlib", "umap": "umap-learn", "sklearn": "scikit-learn"}
    names["distributed"] = "dask"  # an extra of that package, which is asked for
    imported = {package for name in MODULES for package in others(name)}
    assert {names.get(package, package.replace("_", "-")) for package in imported} <= asked
