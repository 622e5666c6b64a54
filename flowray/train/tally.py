"""What became of each step, kept on the device until somebody looks, so that no step waits for the
host to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowray.train.group import Group


class Skipped(NamedTuple):
    """A step that did not reach the weights. step: counted from 1; losses: unweighted, means over
    ranks; norm: of the gradient before clipping.
    """

    step: int
    losses: dict[str, float]
    norm: float


@dataclass
class Tally:
    """skipped: steps in all whose loss or gradient was not finite; in_a_row: of these the last
    ones, up to the last look. clipped of counted: steps since the last logged row.
    """

    skipped: int = 0
    in_a_row: int = 0
    clipped: int = 0
    counted: int = 0
    _names: list[tuple[int, tuple[str, ...]]] = field(default_factory=list, repr=False)
    _noted: list[Tensor] = field(default_factory=list, repr=False)

    def note(
        self,
        step: int,
        skipped: Tensor,
        clipped: Tensor,
        norm: Tensor,
        losses: Mapping[str, Tensor],
    ) -> None:
        """One step's outcome, as scalars on the device."""
        values = (skipped, clipped, norm, *losses.values())
        self._names.append((step, tuple(losses)))
        self._noted.append(torch.stack([value.detach().float() for value in values]))

    def look(self, group: Group) -> list[Skipped]:
        """Fetch what was noted since the last look, in one transfer; the steps skipped since then.
        Every rank of a group looks at the same steps.
        """
        if not self._noted:
            return []
        numbers = iter(group.mean(torch.cat(self._noted)).tolist())
        found = []
        for step, names in self._names:
            skipped, clipped, norm = next(numbers) > 0.5, next(numbers), next(numbers)
            losses = {name: next(numbers) for name in names}
            self.counted += 1
            self.clipped += clipped > 0.5
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                found.append(Skipped(step, losses, norm))
        self.skipped += len(found)
        self._names.clear()
        self._noted.clear()
        return found

    def logged(self) -> dict[str, float]:
        """grad/clip_frac and grad/skipped of a row; the share begins anew. After `look`."""
        row = {
            "grad/clip_frac": self.clipped / max(self.counted, 1),
            "grad/skipped": float(self.skipped),
        }
        self.clipped = self.counted = 0
        return row

    def kept(self) -> dict[str, int]:
        """What has been looked at, as JSON takes it."""
        return {name: getattr(self, name) for name in _KEPT}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `kept` gave."""
        for name in _KEPT & kept.keys():
            setattr(self, name, int(kept[name]))


_KEPT = {"skipped", "in_a_row", "clipped", "counted"}
