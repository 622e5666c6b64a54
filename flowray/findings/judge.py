"""What the doctor says of single numbers: the one judge of a report's colours, of the marks in its
tables and of card.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowray.config.keys import describe
from flowray.config.rounding import rounded
from flowray.findings.checks import Limit, limit_of
from flowray.findings.consequences import SKILL_FLOOR, STD_CEILING, STD_FLOOR
from flowray.findings.derived import DERIVED
from flowray.findings.diagnose import diagnose
from flowray.findings.finding import ORDER, Finding, Judged
from flowray.findings.reading import Absent, Reading, Row

Word = Literal["bad", "warn", "good", ""]

# What is healthy where that depends on the recipe; of all other keys flowray/config/keys.py knows
# the range.
RANGES: Mapping[str, tuple[Limit, Limit]] = {
    "std/mean": (STD_FLOOR, STD_CEILING),
    "shoot/skill": (SKILL_FLOOR, 1.0),
}


@dataclass(frozen=True)
class Verdict:
    """What the doctor says of one number.

    value: as its rules read it, of the raw weights, else of the EMA; None where it was not
    measured. word: the severity of the worst finding that the number is at fault in; good where
    there is none and it lies in `good`, the range that is healthy for this recipe; '' where
    nothing is said of it. finding, evidence: of that worst finding, '' without one.
    """

    key: str
    value: float | None
    word: Word
    good: tuple[float, float] | None
    finding: str = ""
    evidence: str = ""

    @property
    def healthy(self) -> str:
        """The healthy range in few characters, '' where nothing is claimed."""
        if self.good is None:
            return ""
        low, high = self.good
        if math.isinf(low) or math.isinf(high):
            return f"≤ {high:g}" if math.isinf(low) else f"≥ {low:g}"
        return f"{low:.3g} to {high:.3g}"

    @property
    def outside(self) -> bool:
        """Whether the number lies outside the healthy range and no finding speaks of it."""
        return not self.word and self.value is not None and self.good is not None

    @property
    def text(self) -> str:
        """The verdict in few words: `good (0.5 to 1)`, `bad: source_collapsed (0.3 to 1.6)`, `(0.5
        to 1)`.
        """
        said = f"{self.word}: {self.finding}" if self.finding else self.word
        return f"{said} ({self.healthy})".strip() if self.good else said

    @property
    def why(self) -> str:
        """The finding and its evidence, else the healthy range; '' where nothing is said."""
        if self.finding:
            return f"{self.finding}: {self.evidence}"
        return f"healthy: {self.healthy}" if self.good else ""


class Judge:
    """The verdicts on a run's numbers. metrics, facts, history: as `diagnose` takes them;
    findings: the doctor's own where it came.
    """

    def __init__(
        self,
        metrics: Row,
        facts: Mapping[str, Any],
        history: Sequence[Row] = (),
        findings: Sequence[Finding] | None = None,
    ):
        self._reading = Reading(metrics, facts, history, DERIVED)
        self.findings = diagnose(metrics, facts, history) if findings is None else list(findings)
        worst_first = sorted(self.findings, key=lambda finding: ORDER[finding.severity])
        self._at_fault = [(judged, finding) for finding in worst_first for judged in finding.judged]

    def __call__(self, key: str) -> Verdict:
        try:
            name, value, _ = self._reading.find(key)
        except Absent:
            name, value = key, math.nan
        good = self.healthy(key)
        finding = next(
            (finding for judged, finding in self._at_fault if self._means(judged, name)), None
        )
        shown = value if math.isfinite(value) else None
        if finding is not None and finding.severity != "info":
            return Verdict(key, shown, finding.severity, good, finding.id, finding.evidence)
        inside = shown is not None and good is not None and good[0] <= rounded(shown) <= good[1]
        return Verdict(key, shown, "good" if inside else "", good)

    def healthy(self, key: str) -> tuple[float, float] | None:
        """The range that is healthy for this recipe; None where nothing is claimed."""
        base = key.removeprefix("ema/")
        if base in RANGES:
            low, high = (limit_of(self._reading, limit) for limit in RANGES[base])
            return low, high
        known = describe(key)
        return known.good if known is not None else None

    def _means(self, judged: Judged, name: str) -> bool:
        """Whether a finding speaks of this number. The doctor reads the raw weights where this row
        may have the EMA's alone.
        """
        for key in (judged.key, judged.of):
            same = key.removeprefix("ema/") == name.removeprefix("ema/")
            if key == name or (same and key not in self._reading.metrics):
                return True
        return False
