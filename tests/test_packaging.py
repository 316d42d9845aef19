"""What is installed: `sae` and nothing else at an environment's top level, whatever a user's own files are called."""

import contextlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sae
from sae import configs
from sae.pipeline import embedded

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cache", "configs", "pipeline", "cli")
SOURCE = {".py", ".yaml", ".css", ".html", ".js", ".typed", ".json", ".safetensors", ".tiktoken", ".md"}


def packaged() -> set[str]:
    """Every file of the package by its name in a wheel: what lies below `sae/`, links followed."""
    found = set()
    for folder, names, files in os.walk(ROOT / "sae", followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found |= {(Path(folder) / file).relative_to(ROOT).as_posix() for file in files if not file.endswith(".pyc")}
    return found


def test_the_package_is_one_folder_of_links_to_the_rooms() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert wheel == {"packages": ["sae"]}
    links = {path.name: os.readlink(path) for path in (ROOT / "sae").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in ("cache", "configs", "pipeline", "cli.py")}
    files = packaged()
    assert {
        Path(file).suffix for file in files if Path(file).name != "LICENSE"
    } <= SOURCE  # of a library that is shipped
    assert {"sae/__init__.py", "sae/__main__.py", "sae/py.typed", "sae/cli.py"} <= files
    assert {f"sae/configs/{name}.yaml" for name in configs.presets()} <= files
    of_model = {f"sae/pipeline/embedded/model/{path.name}" for path in embedded.MODEL.iterdir()}
    assert of_model <= files and len(of_model) > 3


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_same_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")

    def built(source: Path, *targets: str) -> Path:
        out = tmp_path / f"{source.name}-{'-'.join(targets)}"
        asked = [part for target in targets for part in ("-t", target)]
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *asked]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        return next(out.iterdir())

    def contents(wheel: Path) -> set[str]:
        with zipfile.ZipFile(wheel) as opened:
            return set(opened.namelist())

    names = contents(built(ROOT, "wheel"))
    info = {name for name in names if name.startswith(f"sae_cache-{sae.__version__}.dist-info/")}
    assert names - info == packaged() and {Path(name).name for name in info} >= {
        "METADATA",
        "LICENSE",
        "entry_points.txt",
    }
    with tarfile.open(built(ROOT, "sdist")) as opened:
        assert not [member.name for member in opened if member.issym() or member.islnk()]
        opened.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert {path.name for path in unpacked.iterdir()} == {
        "sae", "docs", "CHANGELOG.md", "constraints.txt", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml",
        ".gitignore",
    }  # fmt: skip
    assert contents(built(unpacked, "wheel")) == names


def locked() -> dict[str, str]:
    """The version of every package that the lock has for this Python and system."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in found
        if one.marker is None or one.marker.evaluate()
    }


def test_the_lock_has_what_every_extra_needs_and_what_these_need() -> None:
    """Followed through what is installed: a package that is not (an extra's) has its name looked up alone."""
    lock = locked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    waiting = [Requirement(one) for one in asked]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name == "sae-cache" or (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        assert name in lock, f"{one}: run `make lock`"
        assert one.specifier.contains(lock[name], prereleases=True), f"{one}: locked at {lock[name]}"
        with contextlib.suppress(metadata.PackageNotFoundError):
            for text in metadata.requires(name) or ():
                needed = Requirement(text)
                extras = ["", *one.extras]
                if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                    waiting.append(needed)
    assert len(seen) > 100


def test_the_version_stands_in_one_place() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert sae.__version__ == version
    for name in packaged():
        if name.endswith((".py", ".md", ".html")):
            assert f'"{version}"' not in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder of a user whose files are called like our rooms; importing any of them fails."""
    for name in ("cache.py", "cli.py", "configs.py", "console.py", "session.py", "dictionaries.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is the user\\'s own')\n")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('this is the user\\'s own')\n")
    return tmp_path


PROGRAM = """
import sys
import sae
from sae.pipeline.commands import app

every = [getattr(sae, name) for name in dir(sae)] if "all" in sys.argv else [sae.SaeError, sae.Dataset]
rooms = ("cache", "configs", "pipeline", "cli", "commands", "console", "session", "dictionaries")
print([name for name in sys.modules if name.partition(".")[0] in rooms])
"""


def run(folder: Path, *command: str) -> str:
    """What a command prints in a folder that comes first on Python's path, and ours behind it."""
    path = os.pathsep.join([".", str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "SAE_CACHE": str(folder / "c"), "SAE_RUNS": str(folder / "r")}
    done = subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("names", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_users_files_of_the_same_names_do_not_matter_to_a_script(crowded: Path, names: str) -> None:
    (crowded / "script.py").write_text(PROGRAM)
    assert run(crowded, sys.executable, "script.py", names) == "[]\n"


@pytest.mark.parametrize("module", ["sae", "sae.cli"])
def test_nor_to_the_command_in_any_of_its_ways(crowded: Path, module: str) -> None:
    assert run(crowded, sys.executable, "-m", module, "--version") == f"sae {sae.__version__}\n"
    assert run(crowded, sys.executable, "-m", module, "cache", "ls", "--json") == "[]\n"


@pytest.mark.slow
def test_nor_under_torchrun(crowded: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    assert run(crowded, *launcher, "-m", "sae.cli", "--version") == f"sae {sae.__version__}\n"
