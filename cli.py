"""Entry point of the `sae` command.

It imports nothing that takes time, so that Ctrl-C is answered in one line while all else is being imported, too.
"""

import sys
from contextlib import suppress

from sae.pipeline.runtime.interrupts import Interrupted, interrupts_raised


def main() -> None:
    """Run the command and leave with its exit code. A signal that ends it is one line, and 128 and its number."""
    raised: list[int] = []
    try:
        with interrupts_raised() as raised:
            from sae.pipeline.commands.app import run

            code = run()
    except Interrupted as stop:
        if raised:  # a library may have made a Ctrl-C of it
            stop = Interrupted(raised[-1], stop.safe, stop.remedy)
        with suppress(OSError):  # the terminal may be gone
            sys.stderr.write(f"sae: error: {stop}\n")
            sys.stderr.flush()
        code = stop.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
