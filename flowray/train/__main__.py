from flowray.cli.common import entry
from flowray.cli.train import main

entry(main)
