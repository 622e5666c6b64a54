"""What a sampler gives the network at every step: shapes and dtypes of state, time code and null
indicator; and the steps, which sum to 1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowray.config.flow import Dopri5Solver, EulerSolver, HeunSolver, MidpointSolver, SolverConfig
from flowray.flow.guidance import guided, with_time_code
from flowray.flow.path import time_code
from flowray.flow.solver import integrate, time_grid

SOLVERS = [
    EulerSolver(),
    EulerSolver(nodes="left"),
    EulerSolver(nodes="endpoint"),
    HeunSolver(),
    MidpointSolver(),
    Dopri5Solver(),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_time_code_is_fp32_one_a_sample(dtype: torch.dtype) -> None:
    """Of times that have the digits for it; half precision would round late ones."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype)
    if dtype.itemsize == 2:
        with pytest.raises(TypeError, match="fp32"):
            time_code(t)
        return
    code = time_code(t)
    assert (code.dtype, code.shape) == (torch.float32, (4,))
    assert code.tolist() == [4.0, 2.0, 0.0, -4.0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: f"{solver.kind}")
def test_what_the_network_is_given(solver: SolverConfig, scale: float) -> None:
    """Guidance doubles the batch: first the samples with their captions, then the same null."""
    calls = 0

    def network(x: Tensor, code: Tensor, null: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        size = 3 if scale == 1.0 else 6
        assert (x.dtype, x.shape) == (torch.float32, (size, 4, 2, 2))
        assert (code.dtype, code.shape) == (torch.float32, (size,))
        assert (null.dtype, null.shape) == (torch.bool, (size,))
        assert null.tolist() == [False] * 3 + [True] * (size - 3)
        assert -4 <= float(code.min()) <= float(code.max()) <= 4
        assert torch.equal(x[:3], x[-3:])
        assert torch.equal(code[:3], code[-3:])
        return torch.ones_like(x)

    z0 = torch.zeros(3, 4, 2, 2)
    end = integrate(solver, guided(with_time_code(network), scale), z0, time_grid("uniform", 7))
    assert calls >= 7 or solver.kind == "dopri5"
    assert (end.dtype, end.shape) == (torch.float32, z0.shape)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: f"{solver.kind}")
def test_the_steps_sum_to_1(solver: SolverConfig, kind: str, steps: int) -> None:
    """A field of ones moves the state by the sum of the steps."""
    z0 = torch.full((2, 1, 2, 2), 0.5)
    end = integrate(solver, lambda x, t: torch.ones_like(x), z0, time_grid(kind, steps))
    assert torch.allclose(end - z0, torch.ones_like(z0), atol=1e-5)
