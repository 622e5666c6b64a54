"""Text-to-image latent flow: training, probes, sweeps. `flowray.examine` looks at any model."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """On first use: torch takes seconds to import."""
    if name != "examine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("flowray.doctor.foreign").examine_foreign
