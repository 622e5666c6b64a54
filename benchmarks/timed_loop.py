"""A training loop that writes down when its first line ran: what `benchmarks trial-startup` trains,
in a module that costs no further import.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray.train

from flowray.rayrun.trainer import Report, train_worker

FIRST_LINE = "began"  # file of a run: when the first line of its loop ran


def timed_loop(config: dict[str, Any], report: Report = ray.train.report) -> None:
    """The real loop, after the time of its first line is written down; of several workers the
    last one's stays.
    """
    Path(config["run_dir"], FIRST_LINE).write_text(repr(time.time()))
    train_worker(config, report)
