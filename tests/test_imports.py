"""What looking around costs: commands that read no numbers import no torch, which alone takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "matplotlib", "distributed")
LOOKING = (
    "--version", "cache ls", "cache du", "cache verify", "cache gc", "cache inspect nothing", "cache rm nothing --yes",
    "compare nothing", "train --lr fast", "train --nonsense", "list", "list --json",
    "eval nothing", "report nothing", "train --activations nothing", "train --resume --name nothing",
    "harvest --tokens-from nothing", "cache export nothing x",
)  # fmt: skip


@pytest.mark.parametrize("command", LOOKING)
def test_looking_around_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    program = (
        "import sys; from sae.cli import main\n"
        f"sys.argv = ['sae', *{command.split()!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('imported', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "SAE_CACHE": str(tmp_path), "SAE_RUNS": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "imported []", ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("registry", "tag"),
    [
        ("sae.pipeline.saes.base.ARCHITECTURES", "arch"),
        ("sae.pipeline.formats.base.FORMATS", "name"),
        ("sae.pipeline.harvest.sources.base.SOURCES", "name"),
    ],
)
def test_what_is_read_of_a_registry_is_what_importing_it_says(registry: str, tag: str) -> None:
    """It is read from the files' text; importing them tells the same."""
    module, attribute = registry.rsplit(".", 1)
    program = (
        "import sys; from importlib import import_module\n"
        "from sae.pipeline.declared import imported, registered\n"
        f"read = registered({registry!r}, {tag!r}); assert 'torch' not in sys.modules\n"
        f"import_module({module.rpartition('.')[0]!r})\n"
        f"there = getattr(sys.modules[{module!r}], {attribute!r})\n"
        "kinds = {name: one if isinstance(one, type) else type(one) for name, one in there.items()}\n"
        "said = {name: imported(kind).summary for name, kind in sorted(kinds.items())}\n"
        "assert {name: one.summary for name, one in read.items()} == said and all(said.values()), (read, said)\n"
        f"assert registered({registry!r}, {tag!r}) == read"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
