"""What a rule says of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["info", "warn", "bad"]
ORDER: Mapping[Severity, int] = {"bad": 0, "warn": 1, "info": 2}


@dataclass(frozen=True)
class Finding:
    """evidence: numbers against thresholds and trivial baselines; fix: what to type; explained_by: the finding it follows from."""

    id: str
    severity: Severity
    evidence: str
    cause: str
    fix: str
    explained_by: str | None = None


def healthy(findings: Sequence[Finding]) -> bool:
    """No finding is warn or bad."""
    return all(finding.severity == "info" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The doctor's object: healthy, the findings, most likely cause first, and which of them follow from which."""
    rows = [asdict(finding) for finding in findings]
    follows = {row["id"]: row["explained_by"] for row in rows if row["explained_by"]}
    return {
        "healthy": healthy(findings),
        "findings": [{key: value for key, value in row.items() if key != "explained_by"} for row in rows],
        "explained_by": follows,
    }
