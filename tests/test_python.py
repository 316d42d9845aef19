"""`import sae`: a list of public names that takes no time to import, and what they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.saes_kit import DICTIONARIES, D, settings

import sae
from sae.cache.disk.tensors import write_tensors
from sae.cache.runs import CONFIG, Run
from sae.pipeline import formats
from sae.pipeline.saes import ARCHITECTURES, SAE, Config, create, register

ROOT = Path(__file__).resolve().parents[1]


def ran(program: str, **options: object) -> str:
    """What a program of a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_importing_it_and_looking_at_its_names_imports_nothing_heavy() -> None:
    program = (
        "import sae, sys\n"
        "names = dir(sae), sae.__all__, sae.__version__, sae.NotFound, hasattr(sae, 'nonesuch')\n"
        "print([name for name in ('torch', 'numpy', 'zarr', 'pydantic', 'transformers') if name in sys.modules])"
    )
    assert ran(program) == "[]\n"


def test_every_name_is_there_and_typed_as_what_it_is() -> None:
    """The imports that type checkers read are those that are made."""
    tree = ast.parse((ROOT / "sae" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    assert sorted([*typed, "__version__"]) == dir(sae) == sae.__all__
    for name, (module, real) in typed.items():
        assert module is not None and getattr(sae, name) is getattr(sys.modules[module], real), name
        assert getattr(sae, name).__doc__, name
    assert sae.__version__


def test_a_name_that_is_not_there_is_said_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has .*TopK.* load"):
        _ = sae.lod


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_settings_of_an_architecture_go_by_the_name_of_its_class(arch: str) -> None:
    assert getattr(sae, ARCHITECTURES[arch].__name__) is ARCHITECTURES[arch].config_type


def test_an_architecture_of_anyone_is_among_the_names_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.pipeline.saes.base.ARCHITECTURES", ARCHITECTURES)
    monkeypatch.setitem(ARCHITECTURES, "mine", None)  # restored, and with it what is registered here
    del ARCHITECTURES["mine"]

    class MineConfig(sae.TopK):
        """Mine."""

        arch: str = "mine"  # type: ignore[assignment]

    class Mine(SAE):
        config_type = MineConfig

    register(Mine)
    assert "Mine" in dir(sae) and sae.Mine is MineConfig


def trained(folder: Path, config: Config, *, seed: int = 0) -> SAE:
    """A finished run folder of an untrained dictionary."""
    made = create(config, D, seed=seed)
    recipe = {"source": {"source": "made-up"}, "split": "train", "d": D, "codec": {"name": "float32"}}
    said = {"train": {"sae": config.model_dump()}, "activations": {"key": "k", "rows": 1, "recipe": recipe}}
    run = Run.create(folder, said)
    metadata = formats.Metadata("some-model", "blocks.1.hook_mlp_out")
    run.save_weights(*formats.saelens.written(made.formula(), metadata))
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", DICTIONARIES)
def test_a_run_is_loaded_by_its_name_its_folder_or_itself(
    arch: str, tmp_path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(tmp_path / "runs" / "one", settings({"arch": arch})).eval()
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "one"
    for coder in (
        sae.load("one"), sae.load("one", runs=str(tmp_path / "runs")), sae.load(str(folder)), sae.load(folder),
        sae.load(Run(folder)),
    ):  # fmt: skip
        assert not coder.training and not any(p.requires_grad for p in coder.parameters())
        latents = coder.encode(x)
        assert latents.dense().shape == (2, 3, coder.d_sae) and not latents.dense().requires_grad
        with torch.no_grad():
            torch.testing.assert_close(coder.decode(latents), made.decode(made.encode(x)))
        torch.testing.assert_close(coder.W_dec, made.W_dec, check_stride=False)
        assert coder.metadata == formats.Metadata("some-model", "blocks.1.hook_mlp_out")


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sae.NotFound, match=r"^one: no such run in runs"):
        sae.load("one")
    made = create(settings({"arch": "topk"}), D)
    formats.write(made, formats.Metadata("m", "blocks.0.hook_mlp_out"), tmp_path / "theirs")
    with pytest.raises(sae.NotFound, match=r"theirs: is not a run of ours; sae\.read"):
        sae.load("theirs")
    with pytest.raises(sae.NotFound, match="nothing: is not a folder"):
        sae.read("nothing")
    trained(tmp_path / "runs" / "one", settings({"arch": "topk"}))
    (tmp_path / "runs" / "one" / "sae_weights.safetensors").unlink()
    with pytest.raises(sae.NotFound, match="has not finished"):
        sae.load("one")
    write_tensors(tmp_path / "runs" / "one", "sae_weights.safetensors", {"W": torch.zeros(1)})
    with pytest.raises(sae.DamagedStore):
        sae.load("one")
    (tmp_path / "runs" / "one" / CONFIG).write_text("{")
    with pytest.raises(sae.DamagedStore):
        sae.load("one")


@pytest.mark.parametrize("format", ["saelens", "sparsify"])
def test_another_tools_dictionary_is_read_as_ready_as_ours(format: str, tmp_path: Path, x: torch.Tensor) -> None:
    made = create(settings({"arch": "topk"}), D).eval()
    formats.write(made, formats.Metadata("m", "layers.1"), tmp_path / "layers.1", format)
    for folder in (tmp_path / "layers.1", str(tmp_path / "layers.1")):
        coder = sae.read(folder)
        assert not coder.training and coder.metadata.hook == "layers.1" and not coder.W_dec.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(coder(x), made(x))
            torch.testing.assert_close(coder.decode(coder.encode(x).dense()), made(x))
