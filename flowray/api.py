"""Runs in a notebook: `pipe = flowray.load("runs/quickstart")`. Nothing heavy is imported before a
run is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowray.sample.pipeline import Pipeline


def load(run: str | Path, keys: Sequence[str] = (), *, device: str | None = None) -> Pipeline:
    """A run's sampler: its newest checkpoint, or that of a `checkpoints/step_*` folder.

    keys: recipe keys as on the command line, e.g. ["sample.weights=raw"]. device: CUDA where there
    is one unless given. InputError, one line, where there is no such run.
    """
    from flowray.sample.pipeline import load_pipeline

    return load_pipeline(Path(run), keys, device)
