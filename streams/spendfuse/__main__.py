"""`python -m spendfuse` is `spendfuse`."""

from spendfuse.cli import main

main()
