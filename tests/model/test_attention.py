"""Attention as heads and velocity networks share it."""

from __future__ import annotations

import pytest
import torch

from flowray.model.layers import attention


@pytest.mark.parametrize("masked", [False, True])
def test_a_cpu_computes_it_in_fp32_within_autocast(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]]) if masked else None

    def gradients() -> list[torch.Tensor]:
        leaves = [each.clone().requires_grad_() for each in inputs]
        attended = attention(*leaves, heads=2, mask=mask)
        attended.square().sum().backward()
        return [attended.detach(), *(each.grad for each in leaves if each.grad is not None)]

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = gradients()
    assert len(plain) == 4
    for one, other in zip(plain, within, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
