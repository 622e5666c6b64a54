"""The table of findings: conditions on metrics, what they mean, what to type. From upstream to
downstream, causes before effects.

Thresholds are the logs' where the logs have one (DESIGN, numbers from the logs); the others lie
between what healthy small runs and runs with the fault planted show.
"""

from __future__ import annotations

from flowray.findings.rule import Rule
from flowray.findings.rules_inputs import INPUTS
from flowray.findings.rules_outcome import OUTCOME
from flowray.findings.rules_training import TRAINING

RULES: tuple[Rule, ...] = (*INPUTS, *TRAINING, *OUTCOME)
