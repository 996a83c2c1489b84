"""The `nfm` command, also as `python -m nfm` for launchers that start modules, such as torchrun."""

import sys


def main() -> None:
    """`pipeline.cli.main`, with Ctrl-C answered in the same way while the imports are still running."""
    try:
        from nfm.pipeline.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
