"""The command line in this process: type a command, get its exit code and what it printed."""

import io
import json
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from sae import cli


class Answer(NamedTuple):
    """What a command left: its exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line an error is: the last on stderr, and the only one of its kind."""
        lines = self.err.splitlines()
        complaints = [line for line in lines if line.startswith("sae: error: ")]
        assert len(complaints) == 1 and lines[-1] == complaints[0], self.err
        assert "Traceback" not in self.err
        return complaints[0].removeprefix("sae: error: ")


def sae(command: str, *more: object, typed: str = "") -> Answer:
    """Run `sae <command> <more>`, with `typed` on stdin."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sae", *shlex.split(command), *map(str, more)])
        patch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as left:
            cli.main()
    code = left.value.code
    assert code is None or isinstance(code, int)
    return Answer(code or 0, out.getvalue(), err.getvalue())


def done(command: str, *more: object) -> Answer:
    """Run a command that must succeed."""
    answer = sae(command, *more)
    assert answer.code == 0, answer.err
    return answer


SMALL_DEMO = [
    "tokenize.tokens=60000", "tokenize.validation_tokens=4096", "harvest.tokens=10000",
    "harvest.validation_tokens=4096", "train.steps=30", "train.batch=512", "train.sae.d_sae=256",
    "train.checkpoint_every=20", "train.log_every=5", "eval.tokens=2048", "eval.dead_rows=0",
]  # fmt: skip
