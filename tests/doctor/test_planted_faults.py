"""Planted faults: the doctor names each first or second, and has nothing against a healthy run.

A few in the normal suite, on runs of a second; all of them, at full length, by `make test-doctor`.
"""

import pytest
from faults import FAULTS, HEALTHY, HEALTHY_RUNS, SMALL, judge, look, plant, rank
from faults_aside import ASIDE
from faults_examples import EXAMPLES
from faults_seen import SEEN, is_seen
from healthy_runs import CALIB, FRESH, LAST, LATER
from source_faults import SOURCE_FAULTS

from flowray.config.load import load_recipe, override_recipe
from flowray.doctor.battery import PARTS
from flowray.findings.finding import healthy

BY_NAME = {fault.name: fault for fault in FAULTS}
QUICK = {"captions_shuffled": 20, "lr_too_low": 20}  # steps
HEALTHY_STEPS = 40
SECONDS = ("weights", "data", "training")  # parts of the examination that take no longer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


def told(findings):
    return [(finding.id, finding.severity, finding.evidence) for finding in findings]


def found(fault, home, steps=None, batch=32, parts=PARTS):
    return judge(look(fault, plant(fault, home, steps), batch, parts))


def test_which_half_a_new_fault_is_in_follows_from_its_name():
    assert all(is_seen(fault.name) for fault in SEEN)
    assert not any(is_seen(fault.name) for fault in ASIDE)
    assert len(SEEN) + len(ASIDE) >= 40
    assert len({fault.kind for fault in (*SEEN, *ASIDE)} - {""}) >= 12
    assert all(fault.about for fault in (*SEEN, *ASIDE)), "say what a right finding is about"


def test_planted_runs_have_names_of_their_own_and_recipes_that_load():
    every = (*FAULTS, *HEALTHY_RUNS, *EXAMPLES, *SEEN, *ASIDE, *CALIB, *FRESH, *LATER, *LAST)
    names = [fault.name for fault in every]
    assert len(set(names)) == len(names)
    base = override_recipe(load_recipe("quickstart_closed").recipe, SMALL)
    for fault in (*EXAMPLES, *SEEN, *ASIDE, *CALIB, *FRESH, *LATER, *LAST):
        override_recipe(base, {**fault.keys, "name": fault.name})
    assert (
        len({str((fault.pictures, fault.keys)) for fault in (*CALIB, *FRESH, *LATER, *LAST)}) == 160
    )


def test_a_healthy_run_has_nothing_above_info(home):
    findings = found(HEALTHY, home, HEALTHY_STEPS, batch=16)
    assert healthy(findings), told(findings)
    assert findings, "40 steps are too few to be good, and the doctor should say so"


@pytest.mark.parametrize("name", QUICK)
def test_the_doctor_names_a_planted_fault(name, home):
    fault = BY_NAME[name]
    findings = found(fault, home, QUICK[name], batch=16, parts=SECONDS)
    assert rank(findings, fault.named_by) in (1, 2), told(findings)


def test_a_run_of_a_broken_source_is_not_healthy_and_is_sent_to_the_selfcheck(home):
    fault = next(fault for fault in SOURCE_FAULTS if fault.name == "sign_flipped")
    findings = found(fault, home, 20, batch=16, parts=SECONDS)
    assert not healthy(findings), told(findings)
    assert "--selfcheck" in findings[0].fix, told(findings)


def test_every_fault_of_the_list_is_planted_once():
    assert len(BY_NAME) == len(FAULTS) >= 28
    assert QUICK.keys() <= BY_NAME.keys()


@pytest.mark.doctor
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_doctor_names_it_first_or_second(fault, tmp_path_factory):
    findings = found(fault, tmp_path_factory.getbasetemp() / "planted")
    assert rank(findings, fault.named_by) in (1, 2), told(findings)


@pytest.mark.doctor
@pytest.mark.parametrize("run", HEALTHY_RUNS, ids=lambda run: run.name)
def test_healthy_runs_of_every_head_raise_nothing_above_info(run, tmp_path_factory):
    findings = found(run, tmp_path_factory.getbasetemp() / "planted")
    assert healthy(findings), told(findings)
