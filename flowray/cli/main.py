"""`flowray <verb>`: every command under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from flowray.cli.common import Main, entry
from flowray.config.errors import InputError, did_you_mean


def _assets() -> Main:
    from flowray.cli.assets import main

    return main


def _data() -> Main:
    from flowray.cli.data import main

    return main


def _eval() -> Main:
    from flowray.cli.eval import main

    return main


def _report() -> Main:
    from flowray.cli.report import main

    return main


def _sample() -> Main:
    from flowray.cli.sample import main

    return main


def _train() -> Main:
    from flowray.cli.train import main

    return main


def _tune() -> Main:
    from flowray.cli.tune import main

    return main


# Each verb imports its own command, so that `flowray --help` loads neither torch nor ray.
_VERBS: dict[str, tuple[Callable[[], Main], str]] = {
    "train": (_train, "train one recipe"),
    "tune": (_tune, "sweep a recipe's keys, stop hopeless trials early"),
    "sample": (_sample, "pictures from a run"),
    "eval": (_eval, "score a run's pictures"),
    "report": (_report, "write report.html of a run or a sweep"),
    "data": (_data, "make, pack and check webdataset shards"),
    "assets": (_assets, "train the small models that flowray ships"),
}


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: flowray <verb> ...   (flowray <verb> --help for each)\n")
        print("\n".join(f"  {verb:<8} {help_text}" for verb, (_, help_text) in _VERBS.items()))
        return 0
    if argv[0] not in _VERBS:
        raise InputError(f"unknown verb {argv[0]!r}{did_you_mean(argv[0], _VERBS)} known: {', '.join(_VERBS)}")
    return _VERBS[argv[0]][0]()(argv[1:])


def main() -> NoReturn:
    """The console script."""
    entry(_dispatch, sys.argv[1:])
