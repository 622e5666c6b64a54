"""Wrong arguments of the functions of flow/ are errors that say what was wanted and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_refused
from torch import Tensor

from flowray.config.flow import EulerSolver, FlowConfig, UniformTime
from flowray.config.losses import Constant
from flowray.flow.draws import Draws, null_partners
from flowray.flow.guidance import conditional, guided
from flowray.flow.path import path_log_snr, psi, sample_path, time_code, velocity_target
from flowray.flow.solver import integrate, time_grid
from flowray.flow.time import time_config, training_times

X, T = torch.zeros(2, 4, 8, 8), torch.tensor([0.1, 0.9])
ONE_CHANNEL, GRID, CPU = X[:, :1], time_grid("uniform", 4), torch.device("cpu")


def still(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


Case = tuple[Callable[[], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "a solver's name": (
        lambda: integrate("euler", still, X, GRID),
        TypeError,
        r"solver: want a config.*got 'euler' \(str\); did you mean EulerSolver\(\)\?",
    ),
    "a config of something else": (
        lambda: integrate(UniformTime(), still, X, GRID),
        TypeError,
        "solver: want a config, one of EulerSolver, .*UniformTime",
    ),
    "no velocity": (lambda: integrate(EulerSolver(), X, X, GRID), TypeError, "velocity_fn: want a"),
    "a picture": (
        lambda: integrate(EulerSolver(), still, X.to(torch.uint8), GRID),
        TypeError,
        r"x: want a floating point tensor.*\(2, 4, 8, 8\) of uint8",
    ),
    "a velocity of one channel": (
        lambda: integrate(EulerSolver(), lambda x, t: x[:, :1], X, GRID),
        ValueError,
        r"x \(2, 4, 8, 8\), velocity \(2, 1, 8, 8\)",
    ),
    "a number of steps for a grid": (
        lambda: integrate(EulerSolver(), still, X, 20),
        TypeError,
        "grid: want times as time_grid makes them, got 20",
    ),
    "a grid that falls": (
        lambda: integrate(EulerSolver(), still, X, GRID[::-1]),
        ValueError,
        "rise",
    ),
    "a grid that ends early": (
        lambda: integrate(EulerSolver(), still, X, GRID[:-1]),
        ValueError,
        "rise",
    ),
    "a grid of one time": (lambda: integrate(EulerSolver(), still, X, [0.0]), ValueError, "rise"),
    "half a step": (
        lambda: time_grid("uniform", 2.5),
        TypeError,
        r"steps: want an integer, got 2\.5",
    ),
    "no grid of that name": (lambda: time_grid("unifrom", 2), ValueError, "did you mean uniform"),
    "unequal channels": (
        lambda: sample_path(T, ONE_CHANNEL, X, 0.0),
        ValueError,
        r"x0 \(2, 1, 8, 8\), x1 \(2, 4, 8, 8\)",
    ),
    "unequal batches": (lambda: sample_path(T[:1], X[:1], X, 0.0), ValueError, "of one shape"),
    "a time for one of two": (lambda: sample_path(T[:1], X, X, 0.0), ValueError, "each of the 2"),
    "a float for t": (
        lambda: sample_path(0.5, X, X, 0.0),
        TypeError,
        r"t: want times.*0\.5 \(float",
    ),
    "integer times": (lambda: sample_path(torch.tensor([0, 1]), X, X, 0.0), TypeError, "int64"),
    "times of 8 bits": (lambda: sample_path(T.bfloat16(), X, X, 0.0), TypeError, "bfloat16"),
    "times (B, 1)": (lambda: sample_path(T[:, None], X, X, 0.0), ValueError, "1-D"),
    "times of 1000 steps": (lambda: sample_path(1000 * T, X, X, 0.0), ValueError, "100 to 900"),
    "a time that is NaN": (lambda: sample_path(T * torch.nan, X, X, 0.0), ValueError, r"\[0, 1\]"),
    "no such source_grad": (
        lambda: sample_path(T, X, X, 0.0, "ful"),
        ValueError,
        "source_grad: want one of full, path, none, got 'ful'.*did you mean full",
    ),
    "a point of unequal latents": (lambda: psi(T, ONE_CHANNEL, X, 0.0), ValueError, "of one shape"),
    "a target of unequal latents": (
        lambda: velocity_target(ONE_CHANNEL, X, 0.0),
        ValueError,
        "shape",
    ),
    "a time code of codes": (lambda: time_code(4 - 8 * T), ValueError, r"in \[0, 1\]"),
    "a log-SNR of percents": (lambda: path_log_snr(100 * T), ValueError, r"in \[0, 1\]"),
    "a time sampler's name": (
        lambda: training_times("uniform", T),
        TypeError,
        r"UniformTime\(\)\?",
    ),
    "uniform numbers (B, 1)": (
        lambda: training_times(UniformTime(), T[:, None]),
        ValueError,
        "u: want",
    ),
    "a sampler for a curriculum": (
        lambda: time_config(UniformTime(), 0, 9),
        TypeError,
        "FlowConfig",
    ),
    "a step before the first": (
        lambda: time_config(FlowConfig(), -1, 9),
        ValueError,
        "step must be",
    ),
    "a scale in words": (lambda: guided(still, "3"), TypeError, r"guidance scale: want a number"),
    "a scale of NaN": (lambda: guided(still, float("nan")), ValueError, "want a finite number"),
    "a scale below 0": (lambda: guided(still, -1.0), ValueError, "from 0, got -1"),
    "draws for nobody": (lambda: Draws(0, 0, 0, slice(None), CPU), ValueError, "batch must be"),
    "rows beyond the batch": (lambda: Draws(0, 0, 8, slice(8, 16), CPU), ValueError, "of the 8"),
    "a row for rows": (lambda: Draws(0, 0, 8, 3, CPU), ValueError, "rows: want a slice"),
    "half a seed": (lambda: Draws(0.5, 0, 8, slice(None), CPU), TypeError, "seed: want an integer"),
    "a probability in percent": (lambda: null_partners(T, 10.0, [0, 1]), ValueError, "from 0 to 1"),
    "samples of another batch": (
        lambda: null_partners(T, 0.1, range(3)),
        ValueError,
        "the 2 places",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_says_what_was_wanted_and_what_came(case: str) -> None:
    assert_refused(*CASES[case])


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 1, 1, 1), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_right_passes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, t = torch.ones(shape, dtype=dtype), torch.linspace(0, 1, shape[0])
    assert sample_path(t, x, x, 0.0).xt.dtype == torch.float32
    assert integrate(EulerSolver(), still, x, GRID).shape == shape
    assert time_code(t + 1e-7).shape == t.shape  # the last step of a sum may end a little beyond 1


def test_no_time_to_check_is_no_error() -> None:
    assert time_code(torch.zeros(0)).shape == (0,)


def test_a_config_of_another_table_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="Constant"):
        training_times(Constant(), T)


def test_values_are_read_on_the_cpu_only() -> None:
    """A GPU would have to be waited for at every step; the meta device has no values at all."""
    x, t = X.to("meta"), T.to("meta")
    assert sample_path(t, x, x, 0.0).xt.shape == X.shape
    assert conditional(lambda x, t, null: x)(x, time_code(t)) is x
