"""`python -m porcelet`."""

from porcelet.cli import main

main()
