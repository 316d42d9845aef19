"""Ctrl-C, SIGTERM and SIGHUP: one line, the right exit code, and nothing lost that need not be, whenever they come."""

import os
import pickle
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae import cli
from sae.pipeline.commands import app
from sae.pipeline.runtime.interrupts import (
    SIGNALS,
    Interrupted,
    interruptible,
    interrupts_raised,
    interrupts_withheld,
    remedied,
    telling,
)

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_with_its_exit_code(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as stopped, interrupts_raised():
        signal.raise_signal(number)
    assert stopped.value.exit_code == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[number.name]


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts(first: signal.Signals, second: signal.Signals) -> None:
    with interrupts_raised(), interruptible() as stopping:
        signal.raise_signal(first)
        assert stopping == [first]
        with pytest.raises(Interrupted) as stopped:
            signal.raise_signal(second)
    assert stopped.value.number == second


@pytest.mark.parametrize("number", SIGNALS)
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    """As SIGHUP is under nohup, and SIGINT in a shell's background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interrupts_raised(), interruptible() as stopping:
            signal.raise_signal(number)
            assert stopping == [] and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_thread_changes_nothing() -> None:
    found = []

    def work() -> None:
        with interrupts_raised(), interruptible() as stopping:
            found.append(stopping)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


def test_what_is_withheld_from_children_is_answered_afterwards() -> None:
    with interruptible() as stopping:
        with interrupts_withheld():
            child = "import signal; print(sorted(s.name for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
            shown = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
            os.kill(os.getpid(), signal.SIGINT)
        while not stopping:  # another thread of this process may have been given it
            time.sleep(0.001)
    assert shown == "['SIGHUP', 'SIGINT']\n" and stopping == [signal.SIGINT]


def test_the_innermost_says_what_is_safe_and_the_outermost_what_to_do() -> None:
    with (
        pytest.raises(Interrupted) as stopped,
        remedied("do this"),
        telling(lambda: "less"),
        telling(lambda: "5 rows are committed"),
    ):
        raise Interrupted(signal.SIGTERM)
    assert str(stopped.value) == "interrupted (SIGTERM); 5 rows are committed; do this"
    assert str(Interrupted(signal.SIGINT)) == "interrupted; repeat the command"
    again = pickle.loads(pickle.dumps(stopped.value))  # between the processes of a training
    assert str(again) == str(stopped.value) and again.exit_code == 143


AT_IMPORT = """
import sys, signal
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            signal.raise_signal(NUMBER)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from sae import cli
sys.argv = ["sae", "harvest"]
cli.main()
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("sae.pipeline.commands", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("rich", signal.SIGINT),
        ("torch", signal.SIGHUP),
    ],
)
def test_while_modules_are_imported(module: str, number: signal.Signals, tmp_path: Path) -> None:
    """One line, the exit code of the signal, no traceback, and no advice that is another command's."""
    code = AT_IMPORT.replace("MODULE", repr(module)).replace("NUMBER", str(int(number)))
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False,
        env={**os.environ, "SAE_CACHE": str(tmp_path)},
    )  # fmt: skip
    which = "" if number == signal.SIGINT else f" ({number.name})"
    assert found.returncode == 128 + number and found.stdout == ""
    assert found.stderr == f"sae: error: interrupted{which}; repeat the command\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_while_the_command_line_is_read(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where typer takes whatever comes for Ctrl-C."""
    monkeypatch.setattr(app.Commands, "make_context", lambda *_, **__: signal.raise_signal(number))
    monkeypatch.setattr(sys, "argv", ["sae", "list"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    which = "" if number == signal.SIGINT else f" ({number.name})"
    assert left.value.code == 128 + number
    assert capsys.readouterr().err == f"sae: error: interrupted{which}; repeat the command\n"


ON_A_TERMINAL = """
import os, sys, time
terminal = os.open(sys.argv[1], os.O_RDWR)  # the first one that the leader of a session opens becomes its own
for number in (0, 1, 2):
    os.dup2(terminal, number)
from sae import cli; import sae.pipeline.commands.app; from sae.pipeline.commands.bars import Bars
def waits():
    bars = Bars()
    bars.start("harvest", 10, "rows")
    bars.advance(1)
    try:
        os.write(1, b"ready")
        time.sleep(60)
    finally:
        bars.finish()
sae.pipeline.commands.app.run = waits
cli.main()
"""


def test_a_terminal_that_is_closed() -> None:
    """What the bars and the last line would write has nowhere to go, and is no error."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, os.ttyname(slave)], cwd=PROJECT, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    shown = b""
    while b"ready" not in shown:
        assert child.poll() is None, shown.decode()
        if select.select([master], [], [], 0.1)[0]:
            shown += os.read(master, 4096)
    os.close(master)
    os.close(slave)
    assert child.wait(30) == 128 + signal.SIGHUP
