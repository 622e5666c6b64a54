"""Train text-to-image latent flow models, draw with them (`flowray.load(RUN)`), and look at any
model of the kind (`flowray.examine`).
"""

import importlib
from typing import Any

from flowray.api import load as load


def __getattr__(name: str) -> Any:
    """On first use: torch takes seconds to import."""
    if name != "examine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("flowray.doctor.foreign").examine_foreign
