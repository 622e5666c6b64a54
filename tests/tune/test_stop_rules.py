"""Stop rules: the contract of every kind, inherited, and when each is met and in which words."""

import math

import pytest
import yaml
from builders import METRIC, make_sweep

from flowray.config.errors import InputError, Notice
from flowray.findings.finding import MOVED
from flowray.findings.rules import RULES
from flowray.sweepconfig.file import dump_sweep, text_sweep
from flowray.sweepconfig.stop import (
    KINDS,
    BoundRule,
    FindingRule,
    GainRule,
    check_rules,
    rule_words,
)
from flowray.tune.stop import StopRules

COS = BoundRule(metric="flow/cos", below=0.3, after=200, patience=2)


def feed(rules, *rows):
    return [rules.feed({"step": step, **metrics}) for step, metrics in rows]


def found(**severities):
    """Row values of an examination: findings by id and severity."""
    return {
        "findings": [
            {"id": name, "severity": severity, "evidence": f"{name} it is"}
            for name, severity in severities.items()
        ]
    }


class StopRuleContract:
    """What every kind of rule does.

    rule: one of patience 2; good, bad: metrics of rows at each of which, and after which, it is far
    from met, or met; wrong: what the file may not say beside it.
    """

    rule: BoundRule | GainRule | FindingRule
    good: tuple[dict, ...]
    bad: tuple[dict, ...]
    wrong: dict

    def rows(self, *metrics, first=10):
        return [(first + 10 * place, each) for place, each in enumerate(metrics)]

    def test_good_rows_stop_nothing_and_bad_ones_do(self):
        assert feed(StopRules([self.rule], METRIC), *self.rows(*self.good)) == [None] * len(
            self.good
        )
        said = feed(StopRules([self.rule], METRIC), *self.rows(*self.bad))
        assert said[:-1] == [None] * (len(self.bad) - 1)
        assert said[-1] is not None

    def test_rows_before_its_step_do_not_count(self):
        late = self.rule.model_copy(update={"after": 1000})
        assert not any(feed(StopRules([late], METRIC), *self.rows(*self.bad)))
        assert feed(StopRules([late], METRIC), *self.rows(*self.bad, first=1000))[-1] is not None

    def test_rows_without_what_it_reads_change_nothing(self):
        between = [each for row in self.bad for each in ({"text/cos": 0.0}, row)]
        said = feed(StopRules([self.rule], METRIC), *self.rows(*between))
        assert [line is not None for line in said] == [False] * (len(said) - 1) + [True]

    def test_a_replay_leaves_the_same_state_and_a_row_counts_once(self):
        *before, (step, last) = self.rows(*self.bad)
        rules, replayed = (StopRules([self.rule], METRIC) for _ in range(2))
        assert not any(feed(rules, *(row for row in before for _ in range(3)), before[0]))
        feed(replayed, *before)
        assert rules.feed({"step": step, **last}) == replayed.feed({"step": step, **last})

    def test_a_file_holds_it_and_says_what_is_wrong(self):
        text = dump_sweep(make_sweep(base="sweep_proxy", stop=[self.rule]))
        assert text_sweep(text, "f").stop == (self.rule,)
        sweep, plain = yaml.safe_load(text), self.rule.model_dump(exclude_none=True)
        for wrong in (self.wrong, {"patience": 0}, {"aftr": 1}, {"after": "soon"}):
            spoilt = yaml.safe_dump({**sweep, "stop": [plain, {**plain, **wrong}]})
            with pytest.raises(InputError, match=r"stop\[1\]"):
                text_sweep(spoilt, "f")

    def test_plan_and_report_say_it(self):
        assert rule_words(self.rule.model_dump(exclude_none=True)) == self.words


class TestBelow(StopRuleContract):
    rule = BoundRule(metric="flow/cos", below=0.3, patience=2)
    good = ({"flow/cos": 0.2}, {"flow/cos": 0.3}, {"flow/cos": 0.2}, {"flow/cos": 0.9})
    bad = ({"flow/cos": 0.2}, {"flow/cos": 0.1})
    wrong = {"above": 1}
    words = "flow/cos below 0.3 at 2 probes from step 0"

    def test_patience_counts_probes_in_a_row_from_after_on(self):
        rules = StopRules([COS], METRIC)
        low, high = {"flow/cos": 0.08}, {"flow/cos": 0.4}
        said = feed(rules, (100, low), (150, low), (200, low), (250, high), (300, low), (350, low))
        # before `after`, one strike, a good probe in between, one strike again
        assert said[:5] == [None] * 5
        assert said[5] == "flow/cos 0.08 stayed below 0.3 for 2 probes, to step 350"


class TestAbove(StopRuleContract):
    rule = BoundRule(metric=METRIC, above=1.5, patience=2)
    good = ({METRIC: 1.6}, {METRIC: 1.5}, {METRIC: 1.6})
    bad = ({METRIC: 1.51}, {METRIC: 9.0})
    wrong = {"gains_less_than": 1}
    words = "shoot/nmse above 1.5 at 2 probes from step 0"

    def test_patience_one(self):
        rules = StopRules([BoundRule(metric=METRIC, above=1.5)], METRIC)
        said = feed(rules, (10, {METRIC: 1.5}), (20, {METRIC: 1.51}))
        assert said == [None, "shoot/nmse 1.51 is above 1.5 at step 20"]


class TestGain(StopRuleContract):
    rule = GainRule(metric=METRIC, gains_less_than=0.1, patience=2)
    good = ({METRIC: 1.0}, {METRIC: 2.0}, {METRIC: 0.9}, {METRIC: 0.9}, {METRIC: 0.8})
    bad = ({METRIC: 1.0}, {METRIC: 0.99}, {METRIC: 0.95})
    wrong = {"below": 1}
    words = "shoot/nmse gains less than 0.1 in 2 probes from step 0"

    def test_a_trial_that_gains_too_little_is_stopped_whatever_its_value(self):
        rule = GainRule(metric=METRIC, gains_less_than=0.1, after=20, patience=2)
        rules = StopRules([rule], METRIC)
        said = [
            rules.feed({"step": step, METRIC: value})
            for step, value in ((10, 1.0), (20, 0.9), (30, 0.85), (40, 0.7), (50, 0.69), (60, 0.66))
        ]
        assert said[:5] == [None] * 5
        assert said[5] == f"{METRIC} 0.66 gained 0.04 in 2 probes, less than 0.1, to step 60"
        higher = StopRules([GainRule(metric="flow/cos", gains_less_than=0.1, patience=1)], METRIC)
        assert [
            higher.feed({"step": s, "flow/cos": v}) for s, v in ((1, 0.1), (2, 0.3), (3, 0.5))
        ] == [None] * 3
        assert (
            higher.feed({"step": 4, "flow/cos": 0.2})
            == "flow/cos 0.2 gained 0 in 1 probes, less than 0.1, to step 4"
        )
        with pytest.raises(InputError, match=r"stop\[0\]: loss/kl is neither better high nor low"):
            check_rules([GainRule(metric="loss/kl", gains_less_than=0.1)], [])


class TestFinding(StopRuleContract):
    rule = FindingRule(finding="source_collapsed", patience=2)
    good = (found(lr_too_low="bad"), found(source_collapsed="bad"), found(), found(clip_weak="bad"))
    bad = (found(source_collapsed="bad"), found(lr_too_low="warn", source_collapsed="info"))
    wrong = {"above": 1}
    words = "finding source_collapsed at 2 examinations from step 0"

    def test_a_finding_that_has_moved_is_read_and_said(self):
        """A sweep that was begun with it goes on; it met it in rows of then alone."""
        rules = [self.rule, FindingRule(finding="scale_twice")]
        with pytest.warns(Notice, match=r"stop\[1\]: scale_twice"):
            check_rules(rules, ["source_collapsed"])
        assert feed(StopRules(rules, METRIC), (10, found(scale_twice="bad")))[-1] is not None
        assert not {rule.id for rule in RULES} & set(MOVED)

    def test_a_finding_stops_in_the_doctors_words_and_patience_counts_examinations(self):
        rules = StopRules([FindingRule(finding="source_collapsed", after=20, patience=2)], METRIC)
        ill = found(lr_too_low="warn", source_collapsed="bad")
        said = feed(rules, (10, ill), (20, ill), (30, {METRIC: 1.0}), (40, ill))
        assert said == [
            None,
            None,
            None,
            "the doctor at step 40, 2 times in a row: source_collapsed: source_collapsed it is",
        ]
        # a visit without it starts again
        assert feed(rules, (50, found(lr_too_low="bad")), (60, ill)) == [None, None]

    def test_a_severity_is_met_by_itself_and_by_worse(self):
        rows = [
            (1, found(undertrained="info")),
            (2, found(clip_weak="warn")),
            (3, found(scale_twice="bad")),
        ]
        met = {
            s: [w is not None for w in feed(StopRules([FindingRule(finding=s)], "a/x"), *rows)]
            for s in ("info", "warn", "bad")
        }
        assert met == {
            "info": [True, True, True],
            "warn": [False, True, True],
            "bad": [False, False, True],
        }

    def test_a_finding_that_does_not_exist_is_refused(self):
        known = [FindingRule(finding="bad"), FindingRule(finding="lr_too_low"), COS]
        check_rules(known, ["lr_too_low"])
        with pytest.raises(InputError, match=r"stop\[0\]: .*did you mean lr_too_low"):
            check_rules([FindingRule(finding="lr_to_low")], ["lr_too_low"])


def test_every_kind_has_its_contract():
    tested = {type(each.rule) for each in StopRuleContract.__subclasses__()}
    assert tested == set(KINDS)


def test_nan_of_a_watched_metric_stops_at_once_and_of_another_does_not():
    assert (
        StopRules([], METRIC).feed({"step": 5, METRIC: math.nan}) == "shoot/nmse is nan at step 5"
    )
    assert (
        StopRules([COS], METRIC).feed({"step": 5, "flow/cos": math.inf})
        == "flow/cos is inf at step 5"
    )
    assert StopRules([COS], METRIC).feed({"step": 5, "text/cos": math.nan, METRIC: None}) is None


def test_every_rule_counts_every_row():
    both = [
        BoundRule(metric="a/x", above=1, patience=2),
        BoundRule(metric="b/y", above=1, patience=2),
    ]
    rules = StopRules(both, "a/x")
    bad = {"a/x": 2.0, "b/y": 2.0}
    assert feed(rules, (1, bad), (2, bad))[1].startswith("a/x")
    assert feed(rules, (3, {"a/x": 0.0, "b/y": 2.0}))[0].startswith("b/y")
