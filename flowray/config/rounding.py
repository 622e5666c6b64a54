"""What of a metric can be compared between two processors, or with a threshold."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def rounded(value: float) -> float:
    """A metric with the six digits that fp32 gives; infinities and NaN as they are.

    The digits beyond depend on the order in which a processor adds. Where metrics are ranked or
    held against a threshold, equal ones must come out equal: so compare them rounded.
    """
    return float(f"{value:.6g}")
