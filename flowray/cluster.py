"""`python -m flowray.cluster`."""

from flowray.cli.cluster import main
from flowray.cli.common import entry

if __name__ == "__main__":
    entry(main)
