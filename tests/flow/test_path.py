"""The path: derivative, end points, gradients into the source, precision."""

import pytest
import torch

from flowray.flow.path import path_log_snr, psi, sample_path, time_code, velocity_target

RHO = 1e-5


def latents(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(6, 2, 3, 3, generator=generator).to(dtype) for _ in range(2))
    return x0, x1


@pytest.mark.parametrize("rho", [0.0, RHO, 0.3])
def test_target_is_the_derivative_of_psi(rho: float) -> None:
    x0, x1 = latents()
    t = torch.linspace(0, 1, 6).requires_grad_(True)
    for seed in range(3):  # a random direction in latent space at a time
        w = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
        (derivative,) = torch.autograd.grad((psi(t, x0, x1, rho) * w).sum(), t)
        assert torch.allclose(
            derivative, (velocity_target(x0, x1, rho) * w).flatten(1).sum(1), atol=1e-4
        )


def test_end_points_and_the_line_between() -> None:
    x0, x1 = latents()
    assert torch.equal(psi(torch.zeros(6), x0, x1, RHO), x0)
    assert torch.allclose(psi(torch.ones(6), x0, x1, RHO), RHO * x0 + x1, atol=1e-6)
    t = torch.rand(6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        psi(t, x0, x1, RHO), x0 + t.view(-1, 1, 1, 1) * velocity_target(x0, x1, RHO), atol=1e-6
    )


def test_fp32_from_bf16() -> None:
    x0, x1 = latents(torch.bfloat16)
    sample = sample_path(torch.linspace(0.1, 0.9, 6), x0, x1, RHO)
    exact = psi(sample.t, x0.double().float(), x1.double().float(), RHO)
    for name in ("x0", "x1", "xt", "v_target"):
        assert getattr(sample, name).dtype == torch.float32, name
    assert torch.equal(sample.xt, exact)
    assert not torch.equal(sample.xt.bfloat16().float(), sample.xt)  # the test can tell


@pytest.mark.parametrize("mode", ["full", "path", "none"])
def test_source_gradient_by_hand(mode: str) -> None:
    """u(x) = a x and L = sum (u(x_t) - v*)^2: dL/dx0 = 2 r (a dx_t/dx0 - dv*/dx0), each factor
    present or not by mode.
    """
    a, rho = 0.7, 0.1
    x0, x1 = latents()
    x0.requires_grad_(True)
    t = torch.linspace(0, 0.9, 6)
    sample = sample_path(t, x0, x1, rho, mode)
    residual = a * sample.xt - sample.v_target
    if mode == "none":
        assert not residual.requires_grad
        return
    (got,) = torch.autograd.grad(residual.square().sum(), x0)
    through_xt = a * (1 + t.view(-1, 1, 1, 1) * (rho - 1))
    through_target = (rho - 1) if mode == "full" else 0.0
    assert torch.allclose(got, 2 * residual.detach() * (through_xt - through_target), atol=1e-5)


def test_modes_agree_on_values() -> None:
    x0, x1 = latents()
    t = torch.linspace(0, 1, 6)
    samples = [sample_path(t, x0, x1, RHO, mode) for mode in ("full", "path", "none")]
    assert all(
        torch.equal(s.xt, samples[0].xt) and torch.equal(s.v_target, samples[0].v_target)
        for s in samples
    )


def test_time_code_is_not_log_snr() -> None:
    t = torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert time_code(t).tolist() == [4.0, 0.0, -2.0, -4.0]
    assert torch.allclose(path_log_snr(t)[1:3], torch.tensor([0.0, 2 * torch.tensor(3.0).log()]))


@pytest.mark.parametrize("bad", [torch.tensor(0.5), torch.zeros(6, 1)])
def test_times_are_one_dimensional(bad: torch.Tensor) -> None:
    x0, x1 = latents()
    with pytest.raises(ValueError, match="1-D"):
        sample_path(bad, x0, x1, RHO)
    with pytest.raises(ValueError, match="1-D"):
        time_code(bad)
