"""`python -m flowray.tune`: a shim."""

from flowray.cli.common import entry
from flowray.cli.tune import main

if __name__ == "__main__":
    entry(main)
