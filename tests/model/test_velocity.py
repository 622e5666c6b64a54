"""Velocity networks: shape, the 1-D time code, the null indicator, the start at nothing."""

from __future__ import annotations

import re

import pytest
import torch
from support import count_parameters, perturbed
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.model import (
    AdaLNCondition,
    CrossAttentionCondition,
    DiMRVelocity,
    DiTVelocity,
    TimeEmbeddingConfig,
    TokenRoute,
    VelocityConfig,
)
from flowray.config.schema import members
from flowray.model.dimr import NullToken, Stage
from flowray.model.dit import DiTBlock
from flowray.model.levels import TimeEmbedding, VelocityNet
from flowray.model.text import TextTokens
from flowray.model.velocity import build_velocity

SPEC = LatentSpec(channels=3, height=4, width=8)
TEXT_WIDTH = 6
TEXT = TextTokens(
    torch.randn(3, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(3)),
    torch.arange(4) < torch.tensor([4, 2, 3])[:, None],
)


class VelocityContract:
    """What every member of VelocityConfig must do."""

    config: DiTVelocity | DiMRVelocity

    def net(self, spec: LatentSpec = SPEC) -> VelocityNet:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_velocity(self.config, spec, TEXT_WIDTH)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(3, *SPEC.shape, generator=torch.Generator().manual_seed(1))
        return x, torch.tensor([4.0, 0.5, -4.0]), torch.tensor([False, True, False])

    def test_shape_and_zero_start(self) -> None:
        x, code, null = self.inputs()
        out = self.net()(x, code, null, TEXT)
        assert out.shape == x.shape
        assert not out.any()

    def test_depends_on_x_time_and_null(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        out = net(x, code, null, TEXT)
        for changed in (
            net(x + 0.5, code, null, TEXT),
            net(x, code - 0.3, null, TEXT),
            net(x, code, ~null, TEXT),
        ):
            assert bool(((changed - out).flatten(1).abs().mean(1) > 1e-4).all())

    def test_samples_do_not_mix(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        rows = [torch.tensor([i]) for i in range(3)]
        alone = torch.cat([net(x[i], code[i], null[i], TEXT.rows(i)) for i in rows])
        assert torch.allclose(net(x, code, null, TEXT), alone, atol=1e-4)

    def test_every_patch_sees_every_other(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        moved = x.clone()
        moved[:, :, 0, 0] += 1
        change = (net(moved, code, null, TEXT) - net(x, code, null, TEXT)).abs()
        assert bool((change[:, :, -1, -1] > 1e-7).all())

    def test_gradients_reach_every_parameter(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        sum(
            (level * w[:, :, : level.shape[2], : level.shape[3]]).sum()
            for level in net.levels(x, code, null, TEXT)
        ).backward()
        assert [
            name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()
        ] == []

    @pytest.mark.parametrize("shape", [(4, 32, 32), (32, 8, 8)], ids=str)
    def test_other_latents(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        _, code, null = self.inputs()
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        levels = perturbed(
            self.net(LatentSpec(channels=channels, height=height, width=width))
        ).levels(x, code, null, TEXT)
        assert levels[-1].shape == x.shape
        assert all(bool(level.isfinite().all()) for level in levels)

    def test_levels_rise_to_the_velocity(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        levels = net.levels(x, code, null, TEXT)
        assert torch.equal(levels[-1], net(x, code, null, TEXT))
        assert len(levels) == len(net.level_weights)
        assert net.level_weights[-1] == 1
        heights = [level.shape[2] for level in levels]
        assert heights == [SPEC.height >> i for i in reversed(range(len(levels)))]

    def test_bf16_autocast(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        exact = net(x, code, null, TEXT)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x, code, null, TEXT)
        assert not torch.equal(rounded.float(), exact)
        assert float(((rounded - exact).norm() / exact.norm()).detach()) < 0.1

    def test_checkpointing_changes_nothing(self) -> None:
        """Same output and gradients, with fewer tensors kept for the backward pass."""
        x, code, null = self.inputs()
        found = []
        for again in (False, True):
            kept = 0

            def keep(tensor: Tensor) -> Tensor:
                nonlocal kept
                kept += tensor.numel()
                return tensor

            config = self.config.model_copy(update={"gradient_checkpointing": again})
            with torch.random.fork_rng():
                torch.manual_seed(0)
                net = perturbed(build_velocity(config, SPEC, TEXT_WIDTH))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = net(x, code, null, TEXT)
            out.square().sum().backward()
            grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            found.append((out.detach(), grads, kept))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)
        assert found[1][2] < 0.6 * found[0][2]

    def test_last_layers_name_every_output(self) -> None:
        """The pattern by which the optimiser finds the velocity head: exactly the layers that
        are zero at the start.
        """
        net = self.net()
        named = {name for name, _ in net.named_modules() if re.fullmatch(net.last_layers, name)}
        assert len(named) == len(net.level_weights)
        assert not any(
            bool(p.any()) for name, p in net.named_parameters() if name.rpartition(".")[0] in named
        )

    @pytest.mark.parametrize("shape", [(3, 1), (3, 1, 1, 1), ()])
    def test_time_code_must_be_one_dimensional(self, shape: tuple[int, ...]) -> None:
        x, _, null = self.inputs()
        with pytest.raises(ValueError, match="1-D"):
            self.net()(x, torch.zeros(shape), null)

    def test_reads_the_caption_where_it_is_conditioned_and_not_null(self) -> None:
        net, (x, code, _) = perturbed(self.net()), self.inputs()
        null, told = torch.zeros(3, dtype=torch.bool), self.config.condition.kind != "none"
        assert net.conditioned == told
        for hidden in (null, ~null):
            own, other = (
                net(x, code, hidden, text) for text in (TEXT, TEXT.rows(torch.tensor([1, 2, 0])))
            )
            changed = (own - other).flatten(1).abs().mean(1) > 1e-5
            assert changed.tolist() == [told and not bool(hidden.any())] * 3

    def test_padding_and_lacking_tokens(self) -> None:
        net, (x, code, null) = perturbed(self.net()), self.inputs()
        if not net.conditioned:
            assert torch.equal(net(x, code, null), net(x, code, null, TEXT))
            return
        with pytest.raises(ValueError, match="text tokens"):
            net(x, code, null)
        values = TEXT.values.masked_fill(~TEXT.mask[:, :, None], 100.0)
        padded = net(x, code, null, TextTokens(values, TEXT.mask))
        assert torch.allclose(padded, net(x, code, null, TEXT), atol=1e-5)


class TestDiT(VelocityContract):
    config = DiTVelocity(width=16, depth=2, heads=2)


@torch.no_grad()
def test_dit_block_is_ada_ln_zero() -> None:
    """Nothing at the start; then x + gate * f((1 + scale) * norm(x) + shift) for attention and
    MLP, all six from the condition.
    """
    draw = torch.Generator().manual_seed(0)
    block, x, condition = (
        DiTBlock(8, 2, 2.0),
        torch.randn(2, 5, 8, generator=draw),
        torch.randn(2, 8, generator=draw),
    )
    assert torch.equal(block(x, condition), x)
    for p in block.parameters():
        p.copy_(0.5 * torch.randn(p.shape, generator=draw))
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.in_proj_weight.copy_(block.qkv.weight)
    reference.in_proj_bias.copy_(block.qkv.bias)
    reference.out_proj.load_state_dict(block.out.state_dict())
    shift, scale, gate, shift_m, scale_m, gate_m = (
        part[:, None] for part in block.modulation(condition).chunk(6, dim=1)
    )
    read = (1 + scale) * F.layer_norm(x, (8,)) + shift
    wanted = x + gate * reference(read, read, read)[0]
    wanted = wanted + gate_m * block.mlp((1 + scale_m) * F.layer_norm(wanted, (8,)) + shift_m)
    torch.testing.assert_close(block(x, condition), wanted)


@torch.no_grad()
def test_dit_tells_places_apart() -> None:
    """The same content everywhere: its positions alone make the patches' velocities differ."""
    net, one = (
        perturbed(build_velocity(TestDiT.config, SPEC, TEXT_WIDTH)),
        torch.ones(1, *SPEC.shape),
    )
    spread = []
    for _ in range(2):
        spread.append(
            float(
                net(one, torch.zeros(1), torch.zeros(1, dtype=torch.bool))
                .flatten(2)
                .std(dim=2)
                .mean()
            )
        )
        net.positions.zero_()
    assert spread[0] > 1e-2
    assert spread[1] < 1e-5


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


class TestDiTToken(VelocityContract):
    config = DiTVelocity(
        width=16, depth=2, heads=2, indicator="token", time=TimeEmbeddingConfig(bound="small_init")
    )

    def test_null_is_a_token_and_not_in_the_condition(self) -> None:
        net = self.net()
        seen: list[Tensor] = []
        net.blocks[0].register_forward_pre_hook(lambda module, args: seen.extend(args))
        net(*self.inputs())
        assert seen[0].shape[1] == 1 + SPEC.height * SPEC.width
        assert torch.equal(seen[0][:, 0], net.null.weight[[0, 1, 0]])
        assert torch.equal(seen[1], F.silu(net.time(self.inputs()[1])))


class TestDiTOnT(VelocityContract):
    """CrossFlow's DiT: a sinusoid of t itself."""

    config = DiTVelocity(
        width=16, depth=2, heads=2, patch=2, time=TimeEmbeddingConfig(of="t", frequencies=8)
    )


class TestDiMR(VelocityContract):
    config = DiMRVelocity(widths=(16, 8), depths=(5, 3), heads=2)

    def test_long_skips_and_states(self) -> None:
        """depth // 2 skips a stage; the stage above reads the input and every block's output,
        upsampled by 4 values a cell.
        """
        net = self.net()
        lower, upper = net.transformer, net.convnext_1
        assert isinstance(lower, Stage)
        assert isinstance(upper, Stage)
        assert [len(lower.skips), len(upper.skips)] == [2, 1]
        assert [(s.in_features, s.out_features) for s in lower.skips] == [(32, 16)] * 2
        assert upper.upsample is not None
        assert (upper.upsample.linear.in_features, upper.upsample.linear.out_features) == (
            16 * 6,
            8 * 4,
        )

    def test_tau_is_the_time_code_over_4_in_every_stage(self) -> None:
        net, taus = self.net(), []
        for stage in net.children():
            stage.register_forward_pre_hook(lambda module, args: taus.append(args[1]))
        x, code, null = self.inputs()
        net(x, code, null)
        assert [tau.tolist() for tau in taus] == [[1.0, 0.125, -1.0]] * 2

    def test_every_lower_state_reaches_the_stage_above(self) -> None:
        x, code, null = self.inputs()
        net = perturbed(self.net())
        _, states = net.transformer(x, code / 4, null, None)
        given = [state.detach().requires_grad_(True) for state in states]
        net.convnext_1(x, code / 4, null, given)[0].square().sum().backward()
        assert len(given) == 6
        assert all(state.grad is not None and bool(state.grad.any()) for state in given)

    def test_skips_pair_the_first_block_with_the_last(self) -> None:
        """With every block the identity, a skip that keeps its second half returns what the
        paired block was given.
        """
        net = self.net().transformer
        for block in net.blocks:
            for p in block.parameters():
                nn.init.zeros_(p)
        for skip in net.skips:
            skip.weight.data = torch.cat([torch.zeros(16, 16), torch.eye(16)], dim=1)
            nn.init.zeros_(skip.bias)
        for index in range(2):  # block i adds 10 ** i
            nn.init.constant_(net.blocks[index].mlp.w2.bias, 10.0**index)
        _, states = net(self.inputs()[0], self.inputs()[1] / 4, self.inputs()[2], None)
        start, first, second, middle, third, last = states
        assert torch.allclose(first - start, torch.ones(()), atol=1e-5)
        assert torch.allclose(second - start, torch.tensor(11.0), atol=1e-5)
        assert torch.equal(third, second)
        assert torch.equal(middle, second)
        assert torch.equal(last, first)

    def test_null_enters_the_transformer_alone(self) -> None:
        x, code, null = self.inputs()
        net = perturbed(self.net())
        below = net.transformer(x, code / 4, null, None)[1]
        assert torch.equal(
            net.convnext_1(x, code / 4, null, below)[0],
            net.convnext_1(x, code / 4, ~null, below)[0],
        )
        assert [name for name, m in net.named_modules() if isinstance(m, NullToken)] == [
            "transformer.null"
        ]
        fresh = self.net().transformer.null(null)
        assert fresh.shape == (3, 1, 16)
        # the published start: -1 where null
        assert fresh[:, 0].tolist() == [[value] * 16 for value in (1.0, -1.0, 1.0)]


class TestDiMRThreeStages(VelocityContract):
    config = DiMRVelocity(
        widths=(16, 8, 4), depths=(3, 3, 1), level_weights=(0.25, 0.5, 1), heads=2, kernel=3
    )


class TestDiMROneStage(VelocityContract):
    config = DiMRVelocity(widths=(16,), depths=(3,), level_weights=(1,), heads=2)


class TestDiTAdaLN(VelocityContract):
    config = DiTVelocity(width=16, depth=2, heads=2, patch=2, condition=AdaLNCondition())


class TestDiTCrossAttention(VelocityContract):
    config = DiTVelocity(width=16, depth=2, heads=2, patch=2, condition=CrossAttentionCondition())


class TestDiTRoute(VelocityContract):
    """Without places to keep, as in probes and pictures, every token goes through every block."""

    config = DiTVelocity(width=16, depth=3, heads=2, patch=2, route=TokenRoute(before=1, after=1))


class TestDiMRCrossAttention(VelocityContract):
    config = DiMRVelocity(
        widths=(16, 8), depths=(3, 3), heads=2, condition=CrossAttentionCondition()
    )


@pytest.mark.parametrize(
    ("bound", "at_first", "later"), [("layer_norm", 1.01, 1.01), ("small_init", 0.05, None)]
)
def test_time_embedding_is_bounded(bound: str, at_first: float, later: float | None) -> None:
    """A LayerNorm holds its root mean square at 1 whatever is learnt before it; small weights
    start it far below an MLP's 0.15.
    """

    def amplitude(embedding: TimeEmbedding) -> float:
        with torch.no_grad():
            out = embedding(torch.linspace(-4, 4, 101))
        assert float(out.std(0).mean()) > 1e-3  # it still tells the times apart
        return float(out.square().mean(1).sqrt().max())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        embedding = TimeEmbedding(TimeEmbeddingConfig(bound=bound), 256)
    assert amplitude(embedding) <= at_first
    with torch.no_grad():
        embedding.mlp[-1].weight.mul_(100)
    if later is not None:
        assert amplitude(embedding) <= later


def test_time_embedding_of_t_sees_t() -> None:
    """The published DiT's sinusoid takes t in [0, 1] unscaled; the time code is 4 - 8t."""
    embedding = TimeEmbedding(TimeEmbeddingConfig(of="t", frequencies=4), 8)
    t = torch.tensor([0.0, 0.3, 1.0])
    angles = t[:, None] * torch.tensor([1.0, 0.01])
    expected = embedding.norm(embedding.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)))
    assert torch.allclose(embedding(4 - 8 * t), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "side", "published"),
    [
        (
            DiMRVelocity(widths=(1024, 512), depths=(65, 33), heads=16),
            32,
            {"transformer": 749.972, "convnext_1": 200.806},
        ),
        (
            DiMRVelocity(
                widths=(1024, 512, 256), depths=(65, 33, 33), heads=16, level_weights=(0.25, 0.5, 1)
            ),
            64,
            {"transformer": 750.022, "convnext_1": 200.813, "convnext_2": 34.605},
        ),
        (
            DiTVelocity(
                width=1280,
                depth=36,
                heads=20,
                patch=2,
                time=TimeEmbeddingConfig(of="t", frequencies=256, bound="small_init"),
            ),
            64,
            {"blocks": 1062.374, "patch_in": 0.022, "time": 1.969, "null": 0.003},
        ),
    ],
    ids=["DiMR 256", "DiMR 512", "DiT-H/2"],
)
def test_trunks_have_the_published_parameters(
    config: VelocityConfig, side: int, published: dict[str, float]
) -> None:
    with torch.device("meta"):
        net = build_velocity(config, LatentSpec(channels=4, height=side, width=side), TEXT_WIDTH)
    for part, millions in published.items():
        # as many decimals as given
        assert count_parameters(net.get_submodule(part)) / 1e6 == pytest.approx(
            millions, abs=5.1e-4
        ), part


def test_every_member_has_its_contract_test() -> None:
    union = set(members(VelocityConfig))
    assert {type(cls.config) for cls in VelocityContract.__subclasses__()} == union


def test_count_parameters() -> None:
    net = build_velocity(TestDiT.config, SPEC, TEXT_WIDTH)
    assert count_parameters(net) == sum(p.numel() for p in net.state_dict().values())
