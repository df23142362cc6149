"""`python -m capsight`: the `capsight` command, for launchers that start modules (`torchrun -m capsight`)."""

from capsight.cli.app import main

main()
