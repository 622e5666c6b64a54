"""What runs of the loop say of their own time: their TensorBoard events carry the clock, so nothing
is added to what is timed.
"""

from __future__ import annotations

from itertools import pairwise

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowray.config.rows import read_rows
from flowray.store.run import RunDirectory


def intervals(run: RunDirectory) -> list[float]:
    """Seconds from the row of each step to that of the next one, with all that comes between:
    probes, samples, a checkpoint. The run logs every step.
    """
    events = EventAccumulator(str(run.path / "tensorboard")).Reload().Scalars("loss/total")
    times = [event.wall_time for event in sorted(events, key=lambda event: event.step)]
    return [late - early for early, late in pairwise(times)]


def losses(run: RunDirectory) -> list[float]:
    """The total loss of every step."""
    return [row["loss/total"] for row in read_rows(run.metrics)]


def turns(names: list[str], number: int) -> list[str]:
    """The arms in the order of a round."""
    return names[:: 1 if number % 2 == 0 else -1]
