"""What stands in for pydantic's models in exported code: the values were checked in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self


class Config:
    """Settings of a part, as the run had them; the classes that follow it are dataclasses."""

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """The same with other values of some fields."""
        made: Self = replace(self, **update)  # type: ignore[type-var]
        return made
