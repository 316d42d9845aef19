"""Fixtures every test module may use."""

import atexit
import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network, even by accident
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and start processes of their own

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Make torch ready where tests run: what only hands them to workers need not wait for it."""
    _answer_signals()
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are tried without a GPU; read where Triton is imported
    torch.set_num_threads(1)  # two spinning pools on two cores are many times slower


def pytest_collection_finish() -> None:
    """Leave what has been imported out of every later search for garbage: it is a million objects, and stays."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # so that the interpreter takes everything down in order


def _answer_signals() -> None:
    """Answer signals as a command in a terminal does: a shell's background and nohup start us ignoring them, and every
    process of ours would ignore them, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and models kept beside the repository; tests that need them skip where they are absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the optional data folder is not here")
    return folder
