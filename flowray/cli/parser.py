"""The argument parser of the commands: what is wrong with a command line is bad input like any other, one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from flowray.config.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `python -m {self.prog} --help`")
