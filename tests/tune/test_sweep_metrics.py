"""Which metrics a sweep may rank by and stop at: those that its trials' probes will have."""

import pytest

from flowray.config.errors import InputError
from flowray.sweepconfig.check import base_recipe, check_trials
from flowray.sweepconfig.file import text_sweep

SWEEP = """
name: s
base: {base}
metric: {{name: {metric}}}
parameters: {{{parameters}}}
"""
LR = "optim.lr: {values: [1e-3, 2e-3]}"
EITHER = "model.source.kind: {values: [text, noise]}"


def check(metric: str, base: str = "quickstart", parameters: str = LR) -> None:
    text = SWEEP.format(base=base, metric=metric, parameters=parameters)
    sweep = text_sweep(text, "s.yaml")
    check_trials(sweep, base_recipe(sweep))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grad/total", "in the training log only"),
        ("ema/loss/flow", "not measured on the EMA weights; type loss/flow"),
        ("flow/cos", "not probed.*type ema/flow/cos"),  # quickstart has probes.raw: false
        ("source/separation@0.25", "not probed.*type ema/source/separation@0.25"),
    ],
)
def test_a_metric_that_no_probe_reports_is_refused(name, words):
    with pytest.raises(InputError, match=f"{name} .*{words}"):
        check(name)


@pytest.mark.parametrize("name", ["std/mean", "ema/source/width", "ema/text/cos_mu"])
def test_a_metric_of_a_text_source_is_refused_where_every_trial_starts_from_noise(name):
    with pytest.raises(InputError, match=f"{name} .*starts from noise"):
        check(name, base="quickstart_noise")
    check("ema/shoot/energy", base="quickstart_noise")
    with pytest.raises(InputError, match=f"{name} .*starts from noise"):
        check(name, parameters="model.source.kind: {values: [noise]}")
    check("ema/std/mean", base="quickstart_noise", parameters=EITHER)


@pytest.mark.parametrize("name", ["loss/clip", "loss/tv"])
def test_a_loss_that_no_trial_computes_is_refused(name):
    """It would be no trial's, and the sweep would end without a best."""
    key = f"loss.{name.removeprefix('loss/')}.weight"
    with pytest.raises(InputError, match=f"{name} .*{key} is 0"):
        check(name)
    check(name, parameters=f"{key}: {{values: [0, 0.3]}}")
    check("loss/kl")
    check("loss/total")
