"""`python -m flowray.eval`."""

from flowray.cli.common import entry
from flowray.cli.eval import main

if __name__ == "__main__":
    entry(main)
