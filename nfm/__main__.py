"""The `nfm` command, also as `python -m nfm` for launchers that start modules, such as torchrun."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """`pipeline.cli.main`, with Ctrl-C answered in the same way while the imports are still running, and without a
    traceback when it is pressed again."""
    try:
        from nfm.pipeline.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        run()
    except KeyboardInterrupt:  # the second one, while the first was answered
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, _end)  # Python ends its threads now, which may take a while


def _end(_signal: int, _frame: FrameType | None) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
