"""`python -m flowray.dashboard`."""

from flowray.cli.common import entry
from flowray.cli.dashboard import main

if __name__ == "__main__":
    entry(main)
