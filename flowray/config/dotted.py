"""Nested settings as dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dotted(section: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; {} for anything else at the top."""
    out: dict[str, Any] = {}
    for key, value in section.items() if isinstance(section, Mapping) else ():
        nested = isinstance(value, Mapping)
        out |= dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out
