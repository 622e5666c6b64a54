"""`python -m flowray.report DIR`."""

from flowray.cli.common import entry
from flowray.cli.report import main

entry(main)
