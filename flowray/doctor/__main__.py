"""`python -m flowray.doctor RUN`."""

from flowray.cli.common import entry
from flowray.cli.doctor import main

if __name__ == "__main__":
    entry(main)
