"""How a sweep ends on a terminal: what stopped and why, what to type next, and last of all, whole,
the verdict.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowray.findings.finding import ORDER
from flowray.report.analysis import best_for_calls_words, runner_up_words
from flowray.report.edges import edges
from flowray.report.lines import wrapped
from flowray.report.results import Sweep, Trial
from flowray.report.sweep_page import mapping, sweep_commands, sweep_verdict
from flowray.sweepconfig.stop import rule_words

REASONS = 3  # groups of stops, and of failures, that are told apart


def ending(sweep: Sweep, page: Path, width: int) -> list[str]:
    """The lines that end a sweep. Commands and paths are one line each, whatever the width: they
    are to be copied.
    """
    lines = [""]
    for head, reasons in (("stopped", stop_reasons(sweep)), ("failed", failures(sweep))):
        for words, count in reasons[:REASONS]:
            said = textwrap.shorten(words, 2 * width - 30, placeholder=" …")
            lines += wrapped(said, width, f"{count:>3} {head}: ", "      ")
        if others := sum(count for _, count in reasons[REASONS:]):
            lines.append(f"{others:>3} {head} for other reasons; all of them are in the report")
    if lines[-1]:
        lines.append("")
    for label, command in sweep_commands(sweep, brief=True).items():
        lines += [f"{label}:", f"  {command}"]
    lines += ["Report:", f"  {page}", ""]
    for edge in edges(sweep):
        lines += wrapped(f"{edge.words} ({edge.typed})", width, rest="  ")
    for words in filter(None, (runner_up_words(sweep), best_for_calls_words(sweep))):
        lines += wrapped(words, width, rest="  ")
    return [*lines, *wrapped(f"{sweep_verdict(sweep)}.", width, rest="  ")]


def stop_reasons(sweep: Sweep) -> list[tuple[str, int]]:
    """Why trials were stopped, by rule, and how many each stopped, the most first."""
    rules = [rule for rule in sweep.settings.get("stop") or () if isinstance(rule, dict)]
    halving = str(mapping(sweep.settings.get("early_terminate")).get("type") or "")
    watched = [sweep.metric.name, *(str(rule["metric"]) for rule in rules if rule.get("metric"))]
    return _counted(_reason(trial, rules, halving, watched) for trial in sweep.by("stopped"))


def failures(sweep: Sweep) -> list[tuple[str, int]]:
    """The errors of failed trials, and how many had each, the most first."""
    return _counted(trial.error or "no error was recorded" for trial in sweep.by("failed"))


def _counted(reasons: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(reasons).most_common()


def _reason(
    trial: Trial, rules: Sequence[Mapping[str, Any]], halving: str, watched: Sequence[str]
) -> str:
    """What of the sweep stopped a trial, in words that are the same for all that it stopped.

    watched: the metrics that stop a trial where they are not finite.
    """
    if trial.stop_kind is None:
        return _guessed(trial, rules, halving)
    if trial.stop_kind == "comparison":
        return _compared(trial, halving)
    if trial.stop_kind == "rule" and trial.stop_rule is not None and trial.stop_rule < len(rules):
        return rule_words(rules[trial.stop_rule])
    return _not_finite(trial, watched) or trial.stopped_by


def _compared(trial: Trial, halving: str) -> str:
    what = "worse than the median" if halving == "median" else f"not among the best ({halving})"
    return f"{what} at step {trial.last_step:,}"


def _not_finite(trial: Trial, watched: Sequence[str]) -> str | None:
    names = [name for name in watched if name in trial.metrics and trial.metrics[name] is None]
    return f"{names[0]} is not finite" if names else None


def _guessed(trial: Trial, rules: Sequence[Mapping[str, Any]], halving: str) -> str:
    """The same for a row that does not say what stopped it (older sweeps), as far as its numbers
    tell.
    """
    if words := _not_finite(trial, list(trial.metrics)):
        return words
    for rule in rules:
        if trial.last_step >= rule.get("after", 0) and _holds(rule, trial):
            return rule_words(rule)
    others = [rule_words(rule) for rule in rules if rule.get("gains_less_than") is not None]
    others += [_compared(trial, halving)] if halving else []
    return others[0] if len(others) == 1 else trial.stopped_by or "no reason was recorded"


def _holds(rule: Mapping[str, Any], trial: Trial) -> bool:
    """Whether a rule on a bound or on a finding is met by the trial's last probe or visit."""
    if wanted := rule.get("finding"):
        worse = [severity for severity in ORDER if ORDER[severity] <= ORDER.get(wanted, -1)]
        return any(
            found["id"] == wanted or found["severity"] in worse
            for found in trial.run.findings or ()
        )
    value, below, above = trial.value(str(rule.get("metric"))), rule.get("below"), rule.get("above")
    return value is not None and (
        (below is not None and value < below) or (above is not None and value > above)
    )
