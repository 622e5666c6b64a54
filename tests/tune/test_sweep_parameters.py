"""How a file says what a parameter is drawn from: spellings, nested keys, priors of the notes."""

import math

import jsonschema
import numpy as np
import pytest
import yaml
from builders import one, refused, sweep_of

from flowray.config.errors import InputError
from flowray.sweepconfig.distributions import (
    Categorical,
    Constant,
    IntUniform,
    LogUniform,
    Prior,
    QLogUniform,
    QUniform,
    Uniform,
)
from flowray.sweepconfig.file import dump_sweep, text_sweep
from flowray.sweepconfig.schema import sweep_schema
from flowray.tune.space import from_priors


@pytest.mark.parametrize(
    ("spec", "key", "made"),
    [
        (
            "{distribution: loguniform, lower: 1e-4, upper: 1e-2}",
            "optim.lr",
            LogUniform(min=1e-4, max=1e-2),
        ),
        ("{distribution: uniform, lower: 0, upper: 2}", "loss.clip.weight", Uniform(min=0, max=2)),
        (
            "{distribution: quniform, lower: 0, upper: 2, q: 0.5}",
            "loss.clip.weight",
            QUniform(min=0, max=2, q=0.5),
        ),
        (
            "{distribution: qloguniform, lower: 8, upper: 64, q: 8}",
            "train.batch_size",
            QLogUniform(min=8, max=64, q=8),
        ),
        # upper is not drawn
        (
            "{distribution: randint, lower: 1, upper: 5}",
            "model.head.layers",
            IntUniform(min=1, max=4),
        ),
        (
            "{distribution: qrandint, lower: 8, upper: 64, q: 8}",
            "train.batch_size",
            QUniform(min=8, max=64, q=8),
        ),
        (
            "{distribution: lograndint, lower: 8, upper: 65}",
            "train.batch_size",
            QLogUniform(min=8, max=64, q=1),
        ),
        (
            "{distribution: choice, categories: [grid, conv]}",
            "model.head.kind",
            Categorical(values=("grid", "conv")),
        ),
        ("{value: null}", "data.limit", Constant(value=None)),
        (
            "{distribution: inv_log_uniform_values, min: 1e-4, max: 1e-2}",
            "optim.lr",
            LogUniform(min=1e-4, max=1e-2),
        ),
        # e^2 to e^4
        (
            "{distribution: q_log_uniform, min: 2, max: 4, q: 8}",
            "train.batch_size",
            QLogUniform(min=8, max=56, q=8),
        ),
    ],
)
def test_rays_and_wandbs_spellings(spec, key, made):
    assert one(spec, key) == made


@pytest.mark.parametrize(
    ("spec", "key", "made"),
    [
        ("{lower: 1e-4, upper: 1e-2}", "optim.lr", Uniform(min=1e-4, max=1e-2)),
        # it is Ray's randint that leaves the upper end out
        ("{lower: 1, upper: 4}", "model.head.layers", IntUniform(min=1, max=4)),
        ("{categories: [grid, conv]}", "model.head.kind", Categorical(values=("grid", "conv"))),
    ],
)
def test_rays_fields_say_as_much_without_a_distribution(spec, key, made):
    assert one(spec, key) == made
    check = jsonschema.Draft202012Validator(sweep_schema())
    whole = {"name": "s", "base": "b", "metric": {"name": "ema/shoot/nmse"}}
    assert check.is_valid({**whole, "parameters": {key: yaml.safe_load(spec)}})


def test_rays_fields_beside_wandbs_names_are_refused_by_the_file_and_by_the_schema():
    assert "unknown key lower, did you mean min?" in refused(
        "  optim.lr: {distribution: log_uniform_values, lower: 1, upper: 2}"
    )
    assert "lower is Ray's word for min; leave one of them out" in refused(
        "  optim.lr: {lower: 1, min: 1, max: 2}"
    )
    check = jsonschema.Draft202012Validator(sweep_schema())
    wandb = {"optim.lr": {"distribution": "log_uniform_values", "lower": 1, "upper": 2}}
    assert not check.is_valid(
        {"name": "s", "base": "b", "metric": {"name": "ema/shoot/nmse"}, "parameters": wandb}
    )


def test_exponents_are_values_of_e_and_a_likely_slip_is_refused():
    made = one("{distribution: log_uniform, min: -9.21, max: -4.6}")
    assert (made.min, made.max) == (pytest.approx(math.exp(-9.21)), pytest.approx(math.exp(-4.6)))
    # log(1/x) from 4.6 to 9.21
    inverse = one("{distribution: inv_log_uniform, min: 4.6, max: 9.21}")
    assert (inverse.min, inverse.max) == (made.min, made.max)
    assert "so this is 1 to 1.01; for values type distribution: log_uniform_values" in refused(
        "  optim.lr: {distribution: log_uniform, min: 1e-4, max: 1e-2}"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "{distribution: normal, mu: 3, sigma: 0.5}",
            "is {distribution: uniform, min: 2, max: 4, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{mu: 3, sigma: 0.5}",
            "is {distribution: uniform, min: 2, max: 4, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{distribution: qrandn, mean: 3, sd: 0.5, q: 1}",
            "is {distribution: q_uniform, min: 2, max: 4, q: 1, prior: {value: 3, sigma: 0.5}}",
        ),
        (
            "{distribution: log_normal, mu: -7, sigma: 1}",
            "min: 0.0001234, max: 0.006738, prior: {value: 0.0009119, sigma: 0.434}}",
        ),
        (
            "{values: [1e-4, 1e-3], probabilities: [0.1, 0.9]}",
            "leave them out, and to begin with one type prior: {value: '1e-3'}",
        ),
        ("{grid_search: [1e-4, 1e-3]}", "type values: ['1e-4', '1e-3'] and, above, method: grid"),
        ("{distribution: sample_from}", "with when: {other.key: its value}"),
        ("{distribution: normal}", "with prior: {value: mean, sigma: standard deviation}"),
        ("{distribution: randint, min: 1, max: 4}", "randint takes lower and upper"),
        ("{distribution: log_uniform_values, lower: 1, upper: 2}", "unknown key lower"),
        ("{min: 1e-4, max: 1e-2, prior: 1e-3}", "want {value: ..., sigma: ...}"),
        (
            "{min: 1e-4, max: 1e-2, prior: {value: 1e-1, sigma: 1}}",
            "prior.value 0.1 must lie between",
        ),
        ("{min: 1e-4, max: 1e-2, prior: {value: 1e-3}}", "needs sigma"),
        (
            "{values: [1e-4, 1e-3], prior: {value: 1e-2}}",
            "prior.value 0.01 must be one of the values",
        ),
        ("{value: 1e-4, prior: {value: 1e-4}}", "prior"),
        ("{min: 1e-4, max: 1e-2, when: grid}", "want another parameter and its values"),
        (
            "{min: 1e-4, max: 1e-2, when: {model.head.kind: grid}}",
            "model.head.kind is not searched",
        ),
        ("{values: [1e-4, 1e-3], when: {optim.lr: 1e-3}}", "lead back to optim.lr itself"),
        (
            "{min: 1e-4, max: 1e-2, when: {optim.lr: 1e-3}}",
            "optim.lr is drawn from a range, which hits no single value",
        ),
    ],
)
def test_bad_parameters_in_one_line(spec, words):
    text = refused(f"  optim.lr: {spec}")
    assert text.startswith("s.yaml:7: ")
    assert words in text


def test_a_prior_of_the_field_notes():
    log = "{distribution: log_uniform_values, min: 0.1, max: 5, prior: field_notes}"
    assert one(log, "loss.clip.weight").prior == Prior(value=2.0, sigma=0.3)
    assert "the field notes say nothing of train.batch_size; they do of optim.lr" in refused(
        "  train.batch_size: {min: 8, max: 64, prior: field_notes}"
    )


@pytest.mark.parametrize(
    ("key", "spec", "spread"),
    [
        ("optim.schedule.t0", "{min: 1000, max: 80000, prior: field_notes}", 0.3),
        ("optim.lr", "{min: 1e-7, max: 1e-4, prior: field_notes}", 0.3),
        ("loss.tv.weight", "{min: 0, max: 1e-5, prior: field_notes}", 0.35),
    ],
)
def test_the_notes_decades_are_a_spread_of_the_value_on_an_even_range(key, spec, spread):
    """Half of the way from 10^-s to 10^s times the value: not s itself, beside which 20000 is
    one value and 2e-6 any.
    """
    parameter = one(spec, key)
    value, sigma = parameter.prior.value, parameter.prior.sigma
    assert sigma == pytest.approx(value * (10**spread - 10**-spread) / 2)
    drawn = [from_priors({key: parameter}, np.random.default_rng(seed))[key] for seed in range(200)]
    assert 0.5 * sigma < np.std(drawn) < 1.1 * sigma  # cut at the ends of the range


def test_the_notes_own_units_are_decades_on_a_log_range_and_values_take_the_value_alone():
    even = one("{min: 1, max: 9, prior: field_notes}", "sample.guidance_scale").prior
    log = one(
        "{distribution: log_uniform_values, min: 1, max: 9, prior: field_notes}",
        "sample.guidance_scale",
    ).prior
    assert even == Prior(value=4.0, sigma=1.5)
    assert 4 * (10**log.sigma - 10**-log.sigma) / 2 == pytest.approx(1.5)
    assert one("{values: [0, 1, 2], prior: field_notes}", "loss.clip.weight").prior == Prior(
        value=2.0
    )


NESTED = """\
  model:
    head:
      kind: {values: [pooled, grid]}
      convs: {values: [0, 1], when: {model: {head: {kind: grid}}}}
  optim: {parameters: {lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}}}
  loss.kl.weight: {value: 2}
"""


def test_nested_keys_are_dotted_keys_and_survive_the_dump():
    sweep = sweep_of(NESTED)
    assert list(sweep.parameters) == [
        "model.head.kind",
        "model.head.convs",
        "optim.lr",
        "loss.kl.weight",
    ]
    assert sweep.parameters["model.head.convs"].when == {"model.head.kind": ("grid",)}
    assert text_sweep(dump_sweep(sweep), "again") == sweep
    with pytest.raises(
        InputError,
        match=(
            r"^s\.yaml:10: parameters: unknown key model\.head\.convz, did you mean"
            r" model\.head\.convs"
        ),
    ):
        sweep_of(NESTED.replace("convs", "convz"))
