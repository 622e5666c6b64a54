"""Whether a command works on a running Ray cluster or on this machine; known without Ray."""

from __future__ import annotations

import os

ADDRESS = "RAY_ADDRESS"  # Ray's own variable


def in_cluster() -> bool:
    """Whether this process is a job of, or pointed at, a running cluster; '' and `local` name
    none.
    """
    return os.environ.get(ADDRESS, "").strip() not in ("", "local")
