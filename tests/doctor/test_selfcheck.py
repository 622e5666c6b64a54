"""`flowray.doctor --selfcheck`: this installation computes what theory says, and each bug planted
in its source is named by the check of what it breaks.
"""

import json

import pytest
from source_faults import SOURCE_FAULTS

from flowray.cli.doctor import main
from flowray.doctor.selfcheck import CHECKS, selfcheck
from flowray.losses import total


def failed(checks):
    return [check.id for check in checks if not check.passed]


@pytest.mark.parametrize("fault", SOURCE_FAULTS, ids=lambda fault: fault.name)
def test_a_bug_in_the_source_is_named_first(fault):
    with fault.bug():
        names = failed(selfcheck())
    assert names[:1] == list(fault.named_by)


def test_every_check_has_a_bug_that_it_finds():
    assert {name for fault in SOURCE_FAULTS for name in fault.named_by} == CHECKS.keys()
    assert len({fault.name for fault in SOURCE_FAULTS}) == len(SOURCE_FAULTS)


def test_the_command_has_a_line_for_each_check_and_needs_no_run(capsys):
    assert main(["--selfcheck"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]


def test_source_that_raises_fails_its_checks_and_no_others(capsys, monkeypatch):
    def broken(t):
        raise KeyError("no such\ncode")

    monkeypatch.setattr(total, "time_code", broken)
    assert main(["--selfcheck", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["check"], said["passed"]) == ("selfcheck", False)
    rows = {row["id"]: row for row in said["checks"]}
    assert rows.keys() == CHECKS.keys()
    # what needs a training step
    trained = {"source", "trained_code", "flow_loss"}
    assert {name for name, row in rows.items() if not row["passed"]} == trained
    assert rows["trained_code"]["where"] == "flowray/losses/total.py"
    assert "KeyError" in rows["trained_code"]["measured"]
