"""`python -m flowray.init`."""

from flowray.cli.common import entry
from flowray.cli.init import main

if __name__ == "__main__":
    entry(main)
