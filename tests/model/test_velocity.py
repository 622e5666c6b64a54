"""Velocity networks: shape, the 1-D time code, the null indicator, the start at nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.model import DiTVelocity, VelocityConfig
from flowray.config.schema import members
from flowray.model.velocity import build_velocity, count_parameters

SPEC = LatentSpec(channels=3, height=4, width=8)


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """Off the zero start, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return net


class VelocityContract:
    """What every member of VelocityConfig must do."""

    config: DiTVelocity

    def net(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_velocity(self.config, SPEC)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(3, *SPEC.shape, generator=torch.Generator().manual_seed(1))
        return x, torch.tensor([4.0, 0.5, -4.0]), torch.tensor([False, True, False])

    def test_shape_and_zero_start(self) -> None:
        x, code, null = self.inputs()
        out = self.net()(x, code, null)
        assert out.shape == x.shape
        assert not out.any()

    def test_depends_on_x_time_and_null(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        out = net(x, code, null)
        for changed in (net(x + 0.5, code, null), net(x, code - 0.3, null), net(x, code, ~null)):
            assert bool(((changed - out).flatten(1).abs().mean(1) > 1e-4).all())

    def test_samples_do_not_mix(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        alone = torch.cat([net(x[i : i + 1], code[i : i + 1], null[i : i + 1]) for i in range(3)])
        assert torch.allclose(net(x, code, null), alone, atol=1e-4)

    def test_every_patch_sees_every_other(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        moved = x.clone()
        moved[:, :, 0, 0] += 1
        change = (net(moved, code, null) - net(x, code, null)).abs()
        assert bool((change[:, :, -1, -1] > 1e-7).all())

    def test_gradients_reach_every_parameter(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        (net(x, code, null) * w).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

    @pytest.mark.parametrize("shape", [(3, 1), (3, 1, 1, 1), ()])
    def test_time_code_must_be_one_dimensional(self, shape: tuple[int, ...]) -> None:
        x, _, null = self.inputs()
        with pytest.raises(ValueError, match="1-D"):
            self.net()(x, torch.zeros(shape), null)


class TestDiT(VelocityContract):
    config = DiTVelocity(width=16, depth=2, heads=2)


class TestDiTPatch2(VelocityContract):
    config = DiTVelocity(width=16, depth=2, heads=2, patch=2)

    def test_patches_go_back_where_they_came_from(self) -> None:
        """With the blocks off, a patch's output depends on that patch alone."""
        net, (x, code, null) = self.net(), self.inputs()
        nn.init.normal_(net.patch_out.weight)
        moved = x.clone()
        moved[:, 1, 2, 5] += 1
        change = (net(moved, code, null) - net(x, code, null)).abs().sum(1)
        touched = change > 1e-6
        assert bool(touched[:, 2:4, 4:6].all())
        touched[:, 2:4, 4:6] = False
        assert not touched.any()


def test_every_member_has_its_contract_test() -> None:
    union = set(members(VelocityConfig))
    assert {type(cls.config) for cls in VelocityContract.__subclasses__()} == union


def test_count_parameters() -> None:
    net = build_velocity(TestDiT.config, SPEC)
    assert count_parameters(net) == sum(p.numel() for p in net.state_dict().values())
