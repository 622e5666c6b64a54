"""Solvers against theory: the teacher field, orders of convergence, and an independent dopri5."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowray.config.flow import Dopri5Solver, EulerSolver, HeunSolver, MidpointSolver, SolverConfig
from flowray.config.schema import members
from flowray.flow.path import psi, velocity_target
from flowray.flow.solver import VelocityFn, integrate, time_grid

RHO = 1e-5
GRIDS = ("uniform", "logit_normal")


def pair(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(batch, 4, 4, 4, generator=generator) for _ in range(2))
    return x0, 3 * x1


def curved(x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = -2 t x^2, nonlinear in x and t; x(1) = x0 / (1 + x0)."""
    return -2 * t.view(-1, 1, 1, 1).to(x.dtype) * x.square()


def positive(batch: int = 3) -> Tensor:
    return 0.3 + 1.5 * torch.rand(batch, 2, 2, 2, generator=torch.Generator().manual_seed(1))


def fitted_order(
    config: EulerSolver | HeunSolver | MidpointSolver | Dopri5Solver,
    kind: str,
    velocity=curved,
    exact=None,
) -> float:
    x0 = positive()
    truth = x0 / (1 + x0) if exact is None else exact(x0)
    counts = [8, 16, 32, 64]
    errors = [
        float((integrate(config, velocity, x0, time_grid(kind, n)) - truth).abs().max())
        for n in counts
    ]
    logs = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(counts, errors, strict=True)])
    centred = logs - logs.mean(0)
    return float(-(centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())


class SolverContract:
    """What every member of SolverConfig must do; `order` is that of a fixed-step one."""

    config: EulerSolver | HeunSolver | MidpointSolver | Dopri5Solver
    order: float | None = None

    @pytest.mark.parametrize("kind", GRIDS)
    def test_teacher_field_is_followed_exactly(self, kind: str) -> None:
        """Dt_psi is constant in t, so training and sampling agree whatever the number of steps."""
        x0, x1 = pair()
        v = velocity_target(x0, x1, RHO)
        end = psi(torch.ones(len(x0)), x0, x1, RHO)
        for n in range(1, 101):
            mse = float(
                (integrate(self.config, lambda x, t: v, x0, time_grid(kind, n)) - end)
                .square()
                .mean()
            )
            assert mse <= 1e-9, (n, mse)

    def test_order_of_convergence(self) -> None:
        if self.order is not None:
            assert fitted_order(self.config, "uniform") == pytest.approx(self.order, abs=0.2)

    def test_normal_quantiles_converge_too(self) -> None:
        """More slowly: the outermost steps shrink only as 1 / (N sqrt(log N))."""
        x0 = positive()
        coarse, fine = (
            float(
                (integrate(self.config, curved, x0, time_grid("logit_normal", n)) - x0 / (1 + x0))
                .abs()
                .max()
            )
            for n in (4, 64)
        )
        assert fine < max(coarse / 3, 1e-5)

    def test_state_is_fp32_whatever_the_model(self) -> None:
        x0, _ = pair()
        seen: list[torch.dtype] = []

        def half(x: Tensor, t: Tensor) -> Tensor:
            seen.extend((x.dtype, t.dtype))
            return (0.1 * x).bfloat16()

        out = integrate(self.config, half, x0.bfloat16(), time_grid("uniform", 5))
        assert out.dtype == torch.float32
        assert set(seen) == {torch.float32}

    def test_times_stay_inside_the_unit_interval(self) -> None:
        seen: list[Tensor] = []

        def field(x: Tensor, t: Tensor) -> Tensor:
            assert t.shape == (len(x),)
            seen.append(t.clone())
            return curved(x, t)

        for kind in GRIDS:
            for n in (1, 3, 7):
                integrate(self.config, field, positive(), time_grid(kind, n))
        times = torch.cat(seen)
        assert bool((times >= 0).all() and (times <= 1).all())

    def test_input_is_left_alone_and_watch_changes_nothing(self) -> None:
        x0 = positive()
        kept, rows = x0.clone(), []
        plain = integrate(self.config, curved, x0, time_grid("uniform", 6))
        watched = integrate(
            self.config,
            curved,
            x0,
            time_grid("uniform", 6),
            observe=lambda k, t, x, v: rows.append((k, t, x.clone(), v.clone())),
        )
        assert torch.equal(x0, kept)
        assert torch.equal(plain, watched)
        assert [k for k, *_ in rows] == list(range(len(rows)))
        assert torch.equal(rows[0][2], x0)
        for _, _, x, v in rows:
            assert x.shape == v.shape == x0.shape
        times = [t for _, t, *_ in rows]
        assert times == sorted(times)

    def test_batch_equals_samples_alone(self) -> None:
        x0 = positive(5)
        together = integrate(self.config, curved, x0, time_grid("uniform", 4))
        alone = torch.cat(
            [
                integrate(self.config, curved, x0[i : i + 1], time_grid("uniform", 4))
                for i in range(5)
            ]
        )
        assert torch.allclose(together, alone, atol=1e-6)


class TestEulerMidpoint(SolverContract):
    config, order = EulerSolver(nodes="midpoint"), 1.0

    def test_second_order_where_the_field_depends_on_t_alone(self) -> None:
        def field(x: Tensor, t: Tensor) -> Tensor:
            return (3 * t).exp().view(-1, 1, 1, 1).expand_as(x)

        assert fitted_order(
            self.config, "uniform", field, lambda x0: x0 + (math.e**3 - 1) / 3
        ) == pytest.approx(2.0, abs=0.1)


class TestEulerLeft(SolverContract):
    config, order = EulerSolver(nodes="left"), 1.0


class TestEulerEndpoint(SolverContract):
    config = EulerSolver(nodes="endpoint")

    def test_nodes_run_from_0_to_1(self) -> None:
        times: list[float] = []
        integrate(
            self.config,
            lambda x, t: 0 * x,
            positive(),
            time_grid("uniform", 5),
            observe=lambda k, t, x, v: times.append(t),
        )
        assert times == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])

    @pytest.mark.parametrize("kind", GRIDS)
    def test_first_order(self, kind: str) -> None:
        assert fitted_order(self.config, kind) == pytest.approx(1.0, abs=0.35)

    @pytest.mark.parametrize("kind", GRIDS)
    def test_each_velocity_is_read_within_its_interval(self, kind: str) -> None:
        times: list[float] = []
        edges = time_grid(kind, 7)
        integrate(
            self.config, lambda x, t: 0 * x, positive(), edges, lambda k, t, x, v: times.append(t)
        )
        assert (times[0], times[-1]) == (0.0, 1.0)
        assert all(a <= t <= b for a, t, b in zip(edges, times, edges[1:], strict=False))


class TestHeun(SolverContract):
    config, order = HeunSolver(), 2.0


class TestMidpoint(SolverContract):
    config, order = MidpointSolver(), 2.0


class TestDopri5(SolverContract):
    config = Dopri5Solver(rtol=1e-6, atol=1e-7)

    def test_equals_an_independent_dopri5(self) -> None:
        from torchdiffeq import odeint

        def swirl(x: Tensor, t: Tensor) -> Tensor:
            s = t.view(-1, 1, 1, 1).to(x.dtype) if t.ndim else t
            return torch.sin(5 * s) * x.roll(1, dims=1) - x * x.abs() + torch.cos(7 * s)

        x0, _ = pair()
        reference = odeint(
            lambda t, x: swirl(x, t),
            x0.double(),
            torch.tensor([0.0, 1.0]).double(),
            rtol=1e-10,
            atol=1e-10,
            method="dopri5",
        )[-1]
        got = integrate(self.config, swirl, x0, time_grid("uniform", 10))
        assert torch.allclose(got.double(), reference, atol=1e-5)

    def test_known_solution_and_tolerance(self) -> None:
        x0 = positive()
        errors = [
            float(
                (
                    integrate(Dopri5Solver(rtol=tol, atol=tol), curved, x0, time_grid("uniform", 1))
                    - x0 / (1 + x0)
                )
                .abs()
                .max()
            )
            for tol in (1e-2, 1e-4, 1e-6)
        ]
        assert errors[2] < errors[0]
        assert all(error < 5 * tol for error, tol in zip(errors, (1e-2, 1e-4, 1e-6), strict=True))

    def test_every_sample_has_its_own_step(self) -> None:
        """A stiff neighbour costs evaluations, never a different answer; at a loose tolerance
        other steps would show.
        """
        rates = torch.tensor([3.0, 60.0, 1.0]).view(-1, 1, 1, 1)
        config, grid = Dopri5Solver(rtol=1e-2, atol=1e-2), time_grid("uniform", 2)
        times: list[Tensor] = []

        def decay(rate: Tensor) -> VelocityFn:
            def field(x: Tensor, t: Tensor) -> Tensor:
                times.append(t.clone())
                return -rate * x

            return field

        x0 = torch.ones(3, 1, 2, 2)
        out = integrate(config, decay(rates), x0, grid)
        assert torch.allclose(out, (-rates).exp() * x0, atol=3e-2)
        # the easy sample waits at t = 1 for the stiff one
        assert sum(bool(t[0] >= 1) for t in times) > len(times) / 2
        alone = torch.cat(
            [integrate(config, decay(rates[i : i + 1]), x0[i : i + 1], grid) for i in range(3)]
        )
        assert torch.allclose(out, alone, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_field_raises(self, bad: float) -> None:
        with pytest.raises(RuntimeError, match="non-finite"):
            integrate(
                self.config,
                lambda x, t: torch.where(t.view(-1, 1, 1, 1) > 0.5, bad, x),
                positive(),
                time_grid("uniform", 4),
            )


def test_every_member_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in SolverContract.__subclasses__()} == set(
        members(SolverConfig)
    )


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 9, 100])
def test_grids(kind: str, steps: int) -> None:
    grid = time_grid(kind, steps)
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    widths = [b - a for a, b in pairwise(grid)]
    assert all(width > 0 for width in widths)
    assert math.fsum(widths) == pytest.approx(1.0, abs=1e-12)
    assert grid == pytest.approx([1 - t for t in reversed(grid)], abs=1e-12)  # both are symmetric


def test_logit_normal_grid_is_normal_quantiles() -> None:
    from statistics import NormalDist

    middle = time_grid("logit_normal", 10)[1:-1]
    assert [math.log(t / (1 - t)) for t in middle] == pytest.approx(
        [NormalDist().inv_cdf(k / 10) for k in range(1, 10)]
    )


@pytest.mark.parametrize(("kind", "steps"), [("uniform", 0), ("logit_normal", -1), ("cosine", 4)])
def test_bad_grids(kind: str, steps: int) -> None:
    with pytest.raises(ValueError):
        time_grid(kind, steps)


def test_the_logs_growing_teacher_error_is_bf16_accumulation() -> None:
    """The users' 'teacher Euler passed' curve grows with N: a bf16 state rounds N times. An fp32
    state does not.
    """
    x0, x1 = pair()
    v = velocity_target(x0, x1, RHO)
    end = psi(torch.ones(len(x0)), x0, x1, RHO)

    def in_bf16(n: int) -> float:
        x = x0.bfloat16()
        for _ in range(n):
            x = x + v.bfloat16() * (1 / n)
        return float((x.float() - end).square().mean())

    theirs = [in_bf16(n) for n in (5, 20, 100)]
    ours = [
        float(
            (
                integrate(EulerSolver(), lambda x, t: v.bfloat16(), x0, time_grid("uniform", n))
                - (x0 + v.bfloat16().float())
            )
            .square()
            .mean()
        )
        for n in (5, 20, 100)
    ]
    assert theirs[0] < theirs[1] < theirs[2]
    assert theirs[2] > 1e-4
    assert max(ours) <= 1e-9
