"""`python -m flowray.bench`: a shim."""

from flowray.cli.bench import main
from flowray.cli.common import entry

if __name__ == "__main__":
    entry(main)
