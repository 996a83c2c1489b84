"""`python -m pipeline`: the `nfm` command for launchers that start modules, such as torchrun."""

from pipeline.cli import main

main()
