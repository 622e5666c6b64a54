"""`python -m flowray.data`."""

from flowray.cli.common import entry
from flowray.cli.data import main

entry(main)
