"""The table of findings: conditions on metrics, what they mean, what to type. From upstream to
downstream, causes before effects.

Each can be the fault of a recipe, data or weights; those that only code of one's own brings about
say so where they stand. Whether the source itself computes what the method prescribes is asked by
`flowray.doctor --selfcheck` (flowray/doctor/selfcheck.py), which needs no run.

Thresholds are those of the field notes (docs/glossary.md) where these have one; the others lie
between what healthy small runs and runs with the fault planted show.
"""

from __future__ import annotations

from flowray.findings.rule import Rule
from flowray.findings.rules_inputs import INPUTS
from flowray.findings.rules_optimiser import OPTIMISER
from flowray.findings.rules_outcome import OUTCOME
from flowray.findings.rules_parts import PARTS
from flowray.findings.rules_seams import SEAM_RULES
from flowray.findings.rules_terms import TERMS
from flowray.findings.rules_training import TRAINING
from flowray.findings.rules_unlike import UNLIKE

RULES: tuple[Rule, ...] = (
    *TERMS,
    *INPUTS,
    *SEAM_RULES,
    *PARTS,
    *OPTIMISER,
    *TRAINING,
    *OUTCOME,
    *UNLIKE,
)
