"""`python -m qcore` is the command `qcore`."""

from qcore.cli.main import main

main()
