"""Another tool, measured in an interpreter of its own in turns with ours."""

import contextlib
import shutil
import subprocess
from pathlib import Path


class Peer:
    """A script of this folder that runs another tool in an interpreter that has it: a run whenever it is asked for one.

    The script says "ready", or anything else where the tool is missing; then a number for every line it is sent.
    """

    missing = True

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        if shutil.which(python) is None:
            return
        path = str(Path(__file__).with_name(script))
        self.process = subprocess.Popen(
            [python, path, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.missing = self._line() != "ready"

    def rate(self, what: str = "go") -> float:
        """What the script measures in one run (tokens per second, say), of the kind it was asked for.

        RuntimeError where it has ended.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
        if not (said := self._line()):
            raise RuntimeError(f"{self.process.args}: ended, asked for {what}")
        return float(said)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
