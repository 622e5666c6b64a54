"""How many processors this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those it is bound to, or all of the machine's where a system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
