"""What an examination fills in, and how one number that cannot be made costs no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowray.config.errors import InputError

Rows = dict[str, float]


@dataclass
class Measured:
    """What the battery fills in; see Examination."""

    metrics: Rows = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What within the block cannot be read (a picture, a caption), or computed (the GPU has no
        room), becomes a note, and the examination goes on behind it: it may be within training.
        """
        try:
            yield
        except (InputError, OSError, RuntimeError) as error:
            self.notes.append(f"{what}: {error}")
