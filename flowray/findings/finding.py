"""What a rule says of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Severity = Literal["info", "warn", "bad"]
Side = Literal["above", "below", "not finite"]
ORDER: Mapping[Severity, int] = {"bad": 0, "warn": 1, "info": 2}
# findings of older versions, and what they are now: no run has one
MOVED: Mapping[str, str] = dict.fromkeys(
    (
        "autoencoder_in_train_mode",
        "decode_scale",
        "epsilon_target",
        "kl_on_scaled",
        "sample_on_latent",
        "scale_inverted",
        "scale_never",
        "scale_twice",
        "time_code_mismatch",
        "velocity_sign",
        "x1_target",
    ),
    "a check of flowray.doctor --selfcheck",
) | {"same_batch_mismatch": "one of seam_tokens, seam_velocity and the other seams"}


@dataclass(frozen=True)
class Judged:
    """A number that a finding holds against a bound and finds wanting.

    key: as it was read, `ema/KEY` where only the EMA was measured; value: None where it is not
    finite; of: the one measured number that a derived one follows from, '' for a measured one and
    where there are several.
    """

    key: str
    value: float | None
    side: Side
    bound: float | None = None
    of: str = ""


@dataclass(frozen=True)
class Finding:
    """evidence: numbers against thresholds and trivial baselines; fix: what to type; explained_by:
    the finding it follows from.

    judged: the numbers at fault. The evidence names others beside them, which are not.
    healthy_share: at most this share of healthy runs has all of them as far out (calibration.py);
    None where no healthy run has measured one of them.
    """

    id: str
    severity: Severity
    evidence: str
    cause: str
    fix: str
    explained_by: str | None = None
    judged: tuple[Judged, ...] = ()
    healthy_share: float | None = None

    @property
    def sure(self) -> str:
        """How sure it is, in words; '' where no healthy run was measured in this."""
        if self.healthy_share is None:
            return ""
        if self.healthy_share == 0:
            return "none of the healthy runs measured looks so"
        return f"of the healthy runs measured {self.healthy_share:.0%} look so in one number"


def healthy(findings: Sequence[Finding]) -> bool:
    """No finding is warn or bad."""
    return all(finding.severity == "info" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The doctor's object: healthy, the findings, most likely cause first, which of them follow
    from which, and how often healthy runs look so.
    """
    rows = [asdict(finding) for finding in findings]
    follows = {row["id"]: row["explained_by"] for row in rows if row["explained_by"]}
    return {
        "healthy": healthy(findings),
        "findings": [
            {key: row[key] for key in ("id", "severity", "evidence", "cause", "fix")}
            for row in rows
        ],
        "explained_by": follows,
        "healthy_share": {row["id"]: row["healthy_share"] for row in rows},
    }


def recorded(row: Mapping[str, Any]) -> Finding | None:
    """A finding as a row of findings.jsonl holds it; None for one that does not say which numbers
    it judges (older runs).
    """
    if not isinstance(row.get("judged"), list):
        return None
    known = {field.name: row[field.name] for field in fields(Finding) if field.name in row}
    return Finding(**known | {"judged": tuple(Judged(**number) for number in row["judged"])})
