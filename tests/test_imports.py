"""What looking around costs: commands that read no numbers import no torch, which alone takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

from support.saes_kit import Planted
from support.small_stores import write_activations

HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "matplotlib", "distributed")
LOOKING = (
    "--version", "cache ls", "cache du", "cache verify", "cache gc", "cache inspect nothing", "cache rm nothing --yes",
    "compare nothing", "train --lr fast", "train --nonsense", "list", "list --json",
    "eval nothing", "report nothing", "train --activations nothing", "train --resume --name nothing",
    "harvest --tokens-from nothing", "cache export nothing x",
)  # fmt: skip


EACH = """
import json, os, sys
from sae.cli import main
import sae.pipeline.commands.app  # which every command imports
heavy, commands = json.loads(sys.argv[1])
assert not {*heavy} & {*sys.modules}
for command in commands:  # each in a process of its own
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    sys.argv = ["sae", *command.split()]
    try:
        main()
    except SystemExit:
        pass
    print("imported", json.dumps([command, [name for name in heavy if name in sys.modules]]), flush=True)
    os._exit(0)
"""

REGISTRIES = (
    ("sae.pipeline.saes.base.ARCHITECTURES", "arch"),
    ("sae.pipeline.formats.base.FORMATS", "name"),
    ("sae.pipeline.harvest.sources.base.SOURCES", "name"),
)

COMPUTING = """
import json, sys
from sae.cli import main
heavy, commands = json.loads(sys.argv[1])
for command in commands:
    sys.argv = ["sae", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
    print("imported", json.dumps([name for name in heavy if name in sys.modules]), flush=True)
"""
UNUSED = (*HEAVY[1:], "torch._dynamo", "torch._inductor", "triton", "sympy", "scipy", "pandas", "pyarrow", "requests")

READ = """
import json, sys
from importlib import import_module
from sae.pipeline.declared import imported, registered
registries = json.loads(sys.argv[1])
read = [registered(*one) for one in registries]
assert "torch" not in sys.modules
for (registry, tag), found in zip(registries, read):
    module, attribute = registry.rsplit(".", 1)
    import_module(module.rpartition(".")[0])
    there = getattr(sys.modules[module], attribute)
    kinds = {name: one if isinstance(one, type) else type(one) for name, one in there.items()}
    said = {name: imported(kind).summary for name, kind in sorted(kinds.items())}
    assert {name: one.summary for name, one in found.items()} == said and all(said.values()), (found, said)
    assert registered(registry, tag) == found
"""


def run(program: str, about: object, **env: str) -> str:
    """What a program prints in an interpreter that has imported nothing yet."""
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **env}
    words = [sys.executable, "-c", program, json.dumps(about)]
    ran = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_looking_around_imports_nothing_heavy(tmp_path: Path) -> None:
    said = run(EACH, [HEAVY, LOOKING], SAE_CACHE=str(tmp_path), SAE_RUNS=str(tmp_path))
    found = [json.loads(line.partition(" ")[2]) for line in said.splitlines() if line.startswith("imported ")]
    assert found == [[command, []] for command in LOOKING]


def test_training_and_judging_import_what_they_compute_with(tmp_path: Path) -> None:
    """No language model's libraries where none is run, no plots, and not torch's compiler, as slow to load as torch."""
    for split in ("train", "validation"):
        write_activations(tmp_path, Planted()(256), split=split, ended=True)
    commands = ["train --arch topk --k 2 --d-sae 16 --batch 32 --steps 2 --name it --device cpu"]
    commands.append("eval it --no-ce --device cpu")
    said = run(COMPUTING, [UNUSED, commands], SAE_CACHE=str(tmp_path), SAE_RUNS=str(tmp_path / "runs"))
    found = [json.loads(line.partition(" ")[2]) for line in said.splitlines() if line.startswith("imported ")]
    assert found == [[], []]


def test_what_is_read_of_a_registry_is_what_importing_it_says() -> None:
    """It is read from the files' text; importing them tells the same."""
    run(READ, REGISTRIES)
