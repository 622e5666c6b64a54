"""Stop rules: one class for each kind of rule, with what it reads of a row and when it is met.

A new kind is a class here, its place in `StopRule`, and a contract test, in
tests/tune/test_stop_rules.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from flowray.config.base import Config
from flowray.config.errors import InputError, Notice, RuleError, did_you_mean
from flowray.config.keys import describe
from flowray.config.rounding import rounded
from flowray.findings.finding import MOVED, ORDER

After = Annotated[int, Field(ge=0)]
Patience = Annotated[int, Field(gt=0)]


class _Rule(Config):
    """bounds: keys that only this kind has, of which it takes one. examines: it reads what the
    doctor found, so the recipe must ask for a doctor.
    """

    bounds: ClassVar[tuple[str, ...]]
    examines: ClassVar[bool] = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it reads."""
        return ()

    @property
    def words(self) -> str:
        """When it is met: flow/cos below 0.3 at 2 probes from step 0."""
        raise NotImplementedError

    def problem(self, finding_ids: Sequence[str]) -> str | None:
        """Why it could never be met, if so."""
        return None

    def read(self, row: Mapping[str, Any]) -> Any:
        """What it judges of a probe row, which has metrics and, where the doctor came, `findings`;
        None where the row has nothing for it.
        """
        raise NotImplementedError

    def judge(self, read: Sequence[Any], step: int) -> str | None:
        """Why to stop at this step, in words, or None. read: what it read of the rows from step
        `after` on, the latest last. A function of it alone, as a resume replays the rows.
        """
        raise NotImplementedError


class _MetricRule(_Rule):
    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @model_validator(mode="after")
    def _has_its_bound(self) -> _MetricRule:
        if sum(getattr(self, name) is not None for name in self.bounds) != 1:
            raise RuleError(f"a stop rule takes either {' or '.join(_bounds())}", *self.bounds)
        return self

    @property
    def sign(self) -> float:
        """1 where the metric is better high, -1 where it is better low, 0 where it is neither."""
        key = describe(self.metric)
        return {"higher": 1.0, "lower": -1.0}.get(key.direction if key else "none", 0.0)

    def read(self, row: Mapping[str, Any]) -> Any:
        return row.get(self.metric)


class BoundRule(_MetricRule):
    """A trial whose metric is below (or above) a bound at `patience` probes in a row, from step
    `after` on, is stopped.
    """

    bounds = ("below", "above")
    below: float | None = None
    above: float | None = None
    after: After = 0
    patience: Patience = 1

    @property
    def words(self) -> str:
        side, bound = self._bound
        return f"{self.metric} {side} {bound:g} at {self.patience} probes from step {self.after}"

    def judge(self, read: Sequence[float], step: int) -> str | None:
        recent = read[-self.patience :]
        if len(recent) < self.patience or not all(map(self._beyond, recent)):
            return None
        side, bound = self._bound
        value = f"{self.metric} {read[-1]:.3g}"
        if self.patience == 1:
            return f"{value} is {side} {bound:g} at step {step}"
        return f"{value} stayed {side} {bound:g} for {self.patience} probes, to step {step}"

    @property
    def _bound(self) -> tuple[str, float]:
        if self.below is not None:
            return "below", self.below
        assert self.above is not None
        return "above", self.above

    def _beyond(self, value: float) -> bool:
        side, bound = self._bound
        less = rounded(value) < rounded(bound)
        return less if side == "below" else rounded(value) > rounded(bound)


class GainRule(_MetricRule):
    """A trial whose best value of the metric improved by less than `gains_less_than` over the last
    `patience` probes, from step `after` on, is stopped.
    """

    bounds = ("gains_less_than",)
    gains_less_than: float = Field(gt=0)
    after: After = 0
    patience: Patience = 1

    @property
    def words(self) -> str:
        gain = f"gains less than {self.gains_less_than:g} in {self.patience} probes"
        return f"{self.metric} {gain} from step {self.after}"

    def problem(self, finding_ids: Sequence[str]) -> str | None:
        neither = f"{self.metric} is neither better high nor low, so it cannot gain"
        return None if self.sign else f"{neither}; take below or above"

    def judge(self, read: Sequence[float], step: int) -> str | None:
        sign, before = self.sign, read[: -self.patience]
        if not before:
            return None
        best = max(sign * rounded(value) for value in before)
        gain = max(best, *(sign * rounded(value) for value in read[-self.patience :])) - best
        if rounded(gain) >= rounded(self.gains_less_than):  # 0.9 - 0.8 is 0.09999999999999998
            return None
        return (
            f"{self.metric} {read[-1]:.3g} gained {gain:.3g} in {self.patience} probes, less than"
            f" {self.gains_less_than:g}, to step {step}"
        )


class FindingRule(_Rule):
    """A trial of which the doctor has this finding at `patience` examinations in a row, from step
    `after` on, is stopped. finding: its id, or a severity, which the worse ones meet too. The base
    recipe must ask for the doctor (`probes.doctor_every`).
    """

    bounds = ("finding",)
    examines = True
    finding: str
    after: After = 0
    patience: Patience = 1

    @property
    def words(self) -> str:
        return f"finding {self.finding} at {self.patience} examinations from step {self.after}"

    def problem(self, finding_ids: Sequence[str]) -> str | None:
        known = [*finding_ids, *ORDER]
        if self.finding in (*known, *MOVED):  # of older sweeps, which go on as they were written
            return None
        return (
            f"unknown finding {self.finding}{did_you_mean(self.finding, known)}; type a severity"
            f" ({', '.join(ORDER)}) or one of {', '.join(finding_ids)}"
        )

    def read(self, row: Mapping[str, Any]) -> Any:
        return row.get("findings")

    def judge(self, read: Sequence[Sequence[Mapping[str, Any]]], step: int) -> str | None:
        met = [next(filter(self._meets, findings), None) for findings in read[-self.patience :]]
        found = met[-1]
        if len(met) < self.patience or not all(met) or found is None:
            return None
        again = f", {self.patience} times in a row" if self.patience > 1 else ""
        return f"the doctor at step {step}{again}: {found['id']}: {found['evidence']}"

    def _meets(self, finding: Mapping[str, Any]) -> bool:
        """It is the one, or its severity is the one or a worse one."""
        order: list[str] = list(ORDER)  # the worst first
        enough = order[: order.index(self.finding) + 1] if self.finding in order else []
        return finding["id"] == self.finding or finding["severity"] in enough


TAG = "rule:"  # begins what pydantic names a kind in the place of an error


def _tag(rule: Any) -> str:
    """Which kind a rule is, by the keys that it has."""
    if isinstance(rule, _Rule):
        return TAG + type(rule).__name__
    given = rule if isinstance(rule, Mapping) else {}
    for kind in KINDS:
        if any(given.get(name) is not None for name in kind.bounds):
            return TAG + kind.__name__
    return TAG + BoundRule.__name__


def _of_one_kind(rule: Any) -> Any:
    """RuleError where a rule has the keys of several kinds or of none. One with a key that no kind
    has is left to the kind's own check.
    """
    if not isinstance(rule, Mapping):
        return rule
    if unknown := {key: value for key, value in rule.items() if key not in rule_keys()}:
        kind = next(kind for kind in KINDS if _tag(rule) == TAG + kind.__name__)
        own = {key: value for key, value in rule.items() if key in kind.model_fields}
        return {**own, **unknown}  # else a key of another kind would be blamed in its place
    given = {key: value for key, value in rule.items() if value is not None}
    if ("metric" in given) == ("finding" in given):
        words = "a stop rule takes either metric or finding"
        raise RuleError(words, "metric", "finding", exclusive=True)
    bounds = _bounds()
    taken = [name for name in bounds if name in given]
    if "finding" in given and taken:
        raise ValueError(f"a stop rule on a finding takes neither {' nor '.join(bounds)}")
    if "metric" in given and len(taken) != 1:
        words = f"a stop rule takes either {' or '.join(bounds)}"
        raise RuleError(words, *bounds, exclusive=True)
    return given


StopRule = Annotated[
    Union[  # noqa: UP007
        Annotated[BoundRule, Tag(TAG + "BoundRule")],
        Annotated[GainRule, Tag(TAG + "GainRule")],
        Annotated[FindingRule, Tag(TAG + "FindingRule")],
    ],
    Discriminator(_tag),
    BeforeValidator(_of_one_kind),
]
KINDS: tuple[type[_Rule], ...] = (BoundRule, GainRule, FindingRule)
_RULE: TypeAdapter[StopRule] = TypeAdapter(StopRule)


def check_rules(rules: Sequence[StopRule], finding_ids: Sequence[str]) -> None:
    """InputError where one could never be met."""
    for index, rule in enumerate(rules):
        if problem := rule.problem(finding_ids):
            raise InputError(f"stop[{index}]: {problem}")
        if isinstance(rule, FindingRule) and rule.finding in MOVED:
            why = f"{rule.finding} is {MOVED[rule.finding]} now"
            warnings.warn(f"stop[{index}]: {why}: it will stop nothing", Notice, stacklevel=2)


def rule_keys() -> list[str]:
    """Every key of a stop rule, whatever its kind."""
    return ["metric", "finding", *_bounds(), "after", "patience"]


def _bounds() -> list[str]:
    """The keys of which a rule on a metric takes one."""
    return [name for kind in KINDS if "metric" in kind.model_fields for name in kind.bounds]


def rule_words(plain: Mapping[str, Any]) -> str:
    """When a rule of a sweep.yaml is met, in words; one that no kind reads as it stands."""
    try:
        rule = _RULE.validate_python(plain)
    except ValidationError:
        return " ".join(f"{key} {value}" for key, value in plain.items())
    return rule.words
