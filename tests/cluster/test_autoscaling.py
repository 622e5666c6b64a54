"""Ray's autoscaler for real: a sweep makes the cluster grow and lets it shrink; a node lost
under a trial costs no trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import optuna
import pytest
from autoscaling import (
    CHECKPOINT_EVERY,
    GROWS,
    LOG_EVERY,
    LOSES,
    LOST,
    NODES,
    Story,
    autoscaling_head,
    tell_growth,
    tell_loss,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray_nodes import Head

from flowray.store.rows import read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with autoscaling_head(tmp_path_factory.mktemp("autoscaling")) as head:
        yield head


def check_trials(story: Story, steps: list[int]) -> None:
    """Every trial was trained once, to its end: in the records, in the study, row by row."""
    assert story.code == 0, story.told[-4000:]
    rows = read_rows(story.folder / "trials.jsonl")
    expected = [(number, "finished", count) for number, count in enumerate(steps)]
    assert [(row["trial"], row["status"], row["last_step"]) for row in rows] == expected
    study = optuna.load_study(
        study_name=None,
        storage=JournalStorage(JournalFileBackend(str(story.folder / "study.journal"))),
    )
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * len(steps)
    for number, count in enumerate(steps):
        logged = [row["step"] for row in read_rows(story.folder / str(number) / "metrics.jsonl")]
        assert logged == list(range(LOG_EVERY, count + 1, LOG_EVERY))
    assert sorted(path.name for path in story.folder.glob("[0-9]*")) == [
        str(number) for number in range(len(steps))
    ]


def test_the_plan_counts_the_nodes_that_the_autoscaler_may_add(head):
    plan = head.command(
        "flowray.tune",
        "sweeps/head.yaml",
        "--plan",
        "--json",
        "max_concurrent=auto",
        "resources.cpus_per_worker=auto",
    )
    facts = json.loads(plan.stdout)
    assert facts["cluster"] == {"cpus": NODES, "gpus": 0, "nodes": NODES + 1}
    assert facts["concurrent"] == NODES
    assert facts["takes"]["resources.cpus_per_worker"] == 1  # three on one node there are not


def test_nodes_come_for_the_trials_and_leave_before_the_last_one_ends(head):
    story = tell_growth(head, "grows")
    check_trials(story, GROWS)
    counts = story.node_counts
    assert (counts[0], max(counts), counts[-1]) == (0, NODES, 0)
    asked = [moment.training + moment.waiting for moment in story.moments]
    assert max(asked) == NODES  # `auto`: the autoscaler's maximum, and no more
    assert any(moment.nodes == 0 and moment.waiting == NODES for moment in story.moments)
    # a trial without a node costs no process
    assert all(moment.processes <= moment.nodes for moment in story.moments)
    alone = [moment for moment in story.moments if moment.ended == len(GROWS) - 1]
    assert any(moment.nodes == 1 and moment.training == 1 for moment in alone)


def test_a_node_lost_under_a_trial_costs_the_work_since_its_checkpoint(head):
    story = tell_loss(head, "loses")
    check_trials(story, LOSES)
    loss = story.loss
    assert loss is not None
    assert loss.checkpoint % CHECKPOINT_EVERY == 0
    assert loss.checkpoint <= loss.step < LOSES[LOST]
    rows = (story.folder / str(LOST) / "metrics.jsonl").read_text().splitlines()
    # to the digit, times included: not trained again
    assert tuple(rows[: len(loss.rows)]) == loss.rows
    assert story.node_counts[-1] == 0
