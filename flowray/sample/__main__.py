from flowray.cli.common import entry
from flowray.cli.sample import main

entry(main)
