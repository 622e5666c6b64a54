"""From numbers to findings, the most likely cause first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowray.findings.calibration import healthy_ranges
from flowray.findings.checks import asked
from flowray.findings.consequences import CONTRADICTIONS
from flowray.findings.derived import DERIVED
from flowray.findings.finding import ORDER, Finding, Judged, healthy
from flowray.findings.reading import Reading, Row
from flowray.findings.rule import Rule, Words
from flowray.findings.rules import RULES


def diagnose(
    metrics: Row,
    facts: Mapping[str, Any],
    history: Sequence[Row] = (),
    rules: Sequence[Rule] = RULES,
) -> list[Finding]:
    """Every finding: causes first (bad before warn before info, upstream before downstream), then
    what they explain.

    metrics: one row of probe values, facts: what is known of the run, history: rows with `step`. A
    rule whose numbers are absent is silent.
    """
    r = Reading(metrics, facts, history, DERIVED)
    found = [(rule, finding) for rule in rules if (finding := _apply(rule, r)) is not None]
    if not healthy([finding for rule, finding in found if not rule.last]):
        found = [pair for pair in found if not pair[0].last]
    # stable: the table goes from cause to consequence
    found.sort(key=lambda pair: ORDER[pair[1].severity])
    return _settle(_agreeing(found), r)


def _agreeing(found: list[tuple[Rule, Finding]]) -> list[tuple[Rule, Finding]]:
    """Of two findings that cannot both be true the first."""
    kept: list[tuple[Rule, Finding]] = []
    for rule, finding in found:
        if not any({rule.id, other.id} <= pair for other, _ in kept for pair in CONTRADICTIONS):
            kept.append((rule, finding))
    return kept


def _healthy_share(judged: Sequence[Judged]) -> float | None:
    """The rarest of the judged numbers among healthy runs bounds how often all are seen there."""
    ranges, shares = healthy_ranges(), []
    for one in judged:
        if one.key in ranges and one.value is not None and one.side != "not finite":
            shares.append(ranges[one.key].beyond(one.value, one.side))
    return min(shares, default=None)


def _apply(rule: Rule, r: Reading) -> Finding | None:
    evidence = asked(rule.when, r)
    if evidence is None:
        return None
    cause, fix = _words(rule.cause, r), _words(rule.fix, r)
    return Finding(
        rule.id,
        rule.severity,
        evidence.words,
        cause,
        fix,
        judged=evidence.judged,
        healthy_share=_healthy_share(evidence.judged),
    )


def _settle(found: list[tuple[Rule, Finding]], r: Reading) -> list[Finding]:
    """Causes by the worst that follows from them, then the findings that a cause explains, which
    name the first that does.
    """
    reach = {rule.id: _explained(rule, [other for other, _ in found], r) for rule, _ in found}
    place = {rule.id: index for index, (rule, _) in enumerate(found)}

    def follows(id: str, other: str) -> bool:
        # of two that explain each other: the first
        return id in reach[other] and not (other in reach[id] and place[id] < place[other])

    severity = {finding.id: ORDER[finding.severity] for _, finding in found}
    roots = [
        finding for _, finding in found if not any(follows(finding.id, other) for other in reach)
    ]
    roots.sort(key=lambda root: min(severity[id] for id in {root.id, *reach[root.id]}))
    ids = [root.id for root in roots]
    rest = [finding for _, finding in found if finding.id not in ids]
    return roots + [
        replace(finding, explained_by=next(id for id in ids if finding.id in reach[id]))
        for finding in rest
    ]


def _explained(rule: Rule, others: Sequence[Rule], r: Reading) -> set[str]:
    """Ids among the found that follow from this rule, directly or through another."""
    by_id = {other.id: other for other in others}
    reached: set[str] = set()
    waiting = [rule]
    while waiting:
        for name in _direct(waiting.pop(), by_id, r):
            if name not in reached and name != rule.id:
                reached.add(name)
                waiting.append(by_id[name])
    return reached


def _direct(rule: Rule, found: Mapping[str, Rule], r: Reading) -> set[str]:
    names = set()
    for entry in rule.explains:
        name, check = entry if isinstance(entry, tuple) else (entry, None)
        if name in found and (check is None or asked(check, r) is not None):
            names.add(name)
    return names


def _words(words: Words, r: Reading) -> str:
    return words(r) if callable(words) else words
