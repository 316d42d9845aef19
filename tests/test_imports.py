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


def test_the_list_of_formats_is_that_of_the_registry() -> None:
    """It is read from the files' text; importing them tells the same."""
    program = (
        "import sys; from sae.pipeline.commands.registry_listing import formats\n"
        "before = formats(); assert 'torch' not in sys.modules\n"
        "from sae.pipeline.formats import FORMATS\n"
        "assert list(before) == sorted(FORMATS) and before == formats(), before\n"
        "assert all(before.values())"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_the_list_of_architectures_is_that_of_the_registry() -> None:
    """It is read from the files' text; importing them tells the same."""
    program = (
        "import sys; from sae.pipeline.commands.registry_listing import architectures\n"
        "before = architectures(); assert 'torch' not in sys.modules\n"
        "from sae.pipeline.saes import ARCHITECTURES\n"
        "assert list(before) == sorted(ARCHITECTURES) and before == architectures(), before\n"
        "assert all(before.values())"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
