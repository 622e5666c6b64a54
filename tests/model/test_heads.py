"""Every head: shape, gradients, what it may and may not read, and its start near the prior."""

from __future__ import annotations

import pytest
import torch
from support import count_parameters
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import (
    ConvHead,
    GridHead,
    HeadConfig,
    ModelConfig,
    PooledHead,
    PosteriorConfig,
    TransEncoderHead,
)
from flowray.config.schema import members
from flowray.model.heads import Mapped, build_head
from flowray.model.latent import LatentMap
from flowray.model.posterior import make_posterior
from flowray.model.text import TextTokens
from flowray.model.transencoder import PostNormLayer, StdNorm

WIDTH, COUNT = 24, 6  # one token more than the prompts have: a head that flattens must fill up
SPECS = [
    LatentSpec(channels=4, height=8, width=8),
    LatentSpec(channels=3, height=4, width=6),
    LatentSpec(channels=4, height=32, width=32),
    LatentSpec(channels=32, height=8, width=8),
]


def tokens(batch: int = 3, count: int = 5, seed: int = 0) -> TextTokens:
    values = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[1, 3:] = False
    return TextTokens(values, mask)


class HeadContract:
    """What every member of HeadConfig must do."""

    config: PooledHead | GridHead | ConvHead | TransEncoderHead

    def head(self, spec: LatentSpec = SPECS[0]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_head(self.config, WIDTH, COUNT, spec)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_shape(self, spec: LatentSpec) -> None:
        mu, logvar = self.head(spec)(tokens())
        assert mu.shape == logvar.shape == (3, *spec.shape)
        assert mu.dtype == logvar.dtype == torch.float32

    def test_gradients_reach_every_parameter(self) -> None:
        head = self.head()
        mu, logvar = head(tokens())
        w = torch.randn(2, *mu.shape, generator=torch.Generator().manual_seed(1))
        (w[0] * mu + w[1] * logvar).sum().backward()
        without = [
            name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()
        ]
        assert without == []

    def test_gradient_reaches_the_tokens(self) -> None:
        given = tokens()
        given.values.requires_grad_(True)
        self.head()(given)[0].square().sum().backward()
        grad = given.values.grad
        assert grad is not None
        assert bool(grad[given.mask].abs().sum(-1).gt(0).all())
        assert not grad[~given.mask].any()

    def test_reads_the_tokens_but_not_the_masked_ones(self) -> None:
        head, given = self.head(), tokens()
        mu, logvar = head(given)
        changed = given.values.clone()
        changed[~given.mask] = 100.0
        same = head(TextTokens(changed, given.mask))
        assert torch.allclose(same[0], mu, atol=1e-6)
        assert torch.allclose(same[1], logvar, atol=1e-6)
        other = head(tokens(seed=1))
        assert float((other[0] - mu).detach().abs().mean()) > 1e-3

    def test_samples_do_not_mix(self) -> None:
        head, given = self.head(), tokens()
        alone = head(TextTokens(given.values[1:2, :3], given.mask[1:2, :3]))
        assert torch.allclose(alone[0], head(given)[0][1:2], atol=1e-5)

    def test_bf16_autocast(self) -> None:
        head = self.head()
        exact = torch.stack(head(tokens()))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.stack(head(tokens()))
        assert float(((rounded - exact).norm() / exact.norm()).detach()) < 0.1

    def test_starts_near_the_prior(self) -> None:
        with torch.no_grad():
            posterior = make_posterior(PosteriorConfig(), *self.head()(tokens(batch=16)))
        assert float(posterior.mu.square().mean().sqrt()) < 0.4
        assert float((posterior.std - 1).abs().mean()) < 0.3

    def test_mu_and_logvar_are_different_outputs(self) -> None:
        mu, logvar = self.head()(tokens())
        assert not torch.allclose(mu, logvar, atol=1e-3)


class TestPooled(HeadContract):
    config = PooledHead(hidden=32)


class TestPooledLinear(HeadContract):
    config = PooledHead(layers=1)


class TestGrid(HeadContract):
    config = GridHead(hidden=32, heads=4)

    def test_cells_differ(self) -> None:
        """By what they learnt, or by their places; without both all would be alike. No
        convolution here: at the edges it differs.
        """

        def spread(*forgotten: str) -> float:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                head = build_head(
                    self.config.model_copy(update={"convs": 0}), WIDTH, COUNT, SPECS[0]
                )
                for name in forgotten:
                    getattr(head, name).zero_()
                return float(head(tokens())[0].flatten(2).std(dim=2).mean())

        assert min(spread(), spread("cells"), spread("positions")) > 1e-3
        assert spread("cells", "positions") < 1e-6


class TestGridNoConv(HeadContract):
    config = GridHead(hidden=16, heads=2, layers=1, convs=0)


class TestConv(HeadContract):
    config = ConvHead(hidden=8, mlp=32)

    def test_three_by_three_convolutions_bring_locality(self) -> None:
        """A cell of the pooled image moves its neighbours: one ring for each of two layers and
        the last convolution.
        """
        head = self.head()
        for conv in head.convs:
            conv[0] = nn.Identity()  # the group norm sees the whole image
        bump = torch.zeros(3, 8, 8, 8)
        bump[:, :, 4, 4] = 1.0
        outputs = []
        for add in (0.0, 1.0):
            hook = head.mlp.register_forward_hook(
                lambda module, inputs, out, add=add: out + add * bump.flatten(1)
            )
            outputs.append(head(tokens())[0].detach())
            hook.remove()
        moved = (outputs[1] - outputs[0]).abs().amax((0, 1)) > 1e-7
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[1:, 1:] = True
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("config", [TestPooled.config, TestConv.config])
def test_pooled_heads_read_the_mean_of_the_tokens_alone(config: HeadConfig) -> None:
    head, given = build_head(config, WIDTH, COUNT, SPECS[0]), tokens()
    means = torch.stack(
        [values[mask].mean(0) for values, mask in zip(given.values, given.mask, strict=True)]
    )
    pooled = head(TextTokens(means[:, None], torch.ones(3, 1, dtype=torch.bool)))
    torch.testing.assert_close(head(given), pooled, rtol=1e-4, atol=1e-5)


class TestTransEncoder(HeadContract):
    config = TransEncoderHead(layers=2, reductions=2, heads=4, ffn=32)

    def test_more_tokens_than_it_was_built_for(self) -> None:
        with pytest.raises(ValueError, match="built for 6 tokens, got 7"):
            self.head()(tokens(count=7))

    def test_it_tells_the_order_of_its_tokens(self) -> None:
        """All tokens are flattened, so their order matters, unlike in a pooled head."""
        head, given = self.head(), tokens()
        turned = TextTokens(given.values.flip(1)[2:], given.mask[2:])
        assert float((head(turned)[0] - head(given)[0][2:]).detach().abs().mean()) > 1e-3


class TestTransEncoderConv(HeadContract):
    config = TransEncoderHead(
        layers=1, reductions=1, heads=2, ffn=16, compress=8, adaptor="conv", hidden=32, planes=2
    )


class TestTransEncoderPlain(HeadContract):
    config = TransEncoderHead(layers=1, reductions=0, heads=2, ffn=16)


class TestReshaped(HeadContract):
    """A 4 x 4 grid for an 8 x 8 latent: as many values, so a reshape and no map."""

    config = GridHead(
        hidden=16, heads=2, layers=1, shape=LatentSpec(channels=16, height=4, width=4)
    )

    @pytest.mark.parametrize("spec", SPECS[:1], ids=str)
    def test_shape(self, spec: LatentSpec) -> None:
        super().test_shape(spec)
        head = self.head(spec)
        assert isinstance(head, Mapped)
        assert count_parameters(head) == count_parameters(head.head)
        assert torch.equal(head(tokens())[0].flatten(), head.head(tokens())[0].flatten())


def test_norm_divides_by_the_unbiased_std() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0]])
    # ((-2)^2 + 1 + 9) / (3 - 1) = 7
    assert torch.allclose(StdNorm(3)(x), (x - 3) / (7**0.5 + 1e-5), atol=1e-7)


def test_layer_is_the_post_norm_transformer_layer() -> None:
    """torch's own encoder layer with our norm in place of its LayerNorm, given the same weights
    and mask.
    """
    ours = PostNormLayer(12, TransEncoderHead(heads=2, ffn=8), narrow=False)
    theirs = nn.TransformerEncoderLayer(12, 2, 8, dropout=0.0, batch_first=True, norm_first=False)
    theirs.norm1, theirs.norm2 = StdNorm(12), StdNorm(12)
    theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = (
        ours.qkv.weight.data,
        ours.qkv.bias.data,
    )
    theirs.self_attn.out_proj.load_state_dict(ours.out.state_dict())
    theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
    theirs.linear2.load_state_dict(ours.mlp[3].state_dict())
    x, mask = (
        5 + 3 * torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 4, dtype=torch.bool),
    )
    mask[1, 2:] = False
    assert torch.allclose(
        ours(x, mask)[mask], theirs(x, src_key_padding_mask=~mask)[mask], atol=1e-5
    )


def test_absent_tokens_are_zero_where_the_tokens_are_flattened() -> None:
    head = build_head(
        TransEncoderHead(layers=1, reductions=1, heads=2, ffn=16), WIDTH, COUNT, SPECS[0]
    )
    given = tokens()
    head(TextTokens(given.values[1:2], given.mask[1:2]))[0].square().sum().backward()
    grad = head.out[0].weight.grad.unflatten(1, (COUNT, WIDTH // 2)).abs().sum((0, 2))
    assert (grad > 0).tolist() == [True] * 3 + [False] * 3


def test_dropout_acts_in_training_alone() -> None:
    config = TransEncoderHead(layers=1, reductions=0, heads=2, ffn=64, dropout=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = build_head(config, WIDTH, COUNT, SPECS[0])
        a, b = head(tokens())[0], head(tokens())[0]
        assert not torch.equal(a, b)
        head.eval()
        assert torch.equal(head(tokens())[0], head(tokens())[0])


@pytest.mark.parametrize("silent", ["attention", "mlp"])
def test_dropout_acts_in_attention_and_in_the_mlp(silent: str) -> None:
    """Either alone still draws when the other's output is at zero; with both at zero nothing
    does.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = PostNormLayer(12, TransEncoderHead(heads=2, ffn=32, dropout=0.5), narrow=False)
        x, mask = torch.randn(2, 4, 12), torch.ones(2, 4, dtype=torch.bool)
        last = {"attention": layer.out, "mlp": layer.mlp[-1]}
        with torch.no_grad():
            last.pop(silent).weight.zero_()
            assert not torch.equal(layer(x, mask), layer(x, mask))
            next(iter(last.values())).weight.zero_()
            assert torch.equal(layer(x, mask), layer(x, mask))


def test_transencoder_refuses_widths_that_cannot_be_halved() -> None:
    with pytest.raises(
        InputError, match="2 reductions halve the token width 24 to 6, and 5 heads must divide 12"
    ):
        build_head(TransEncoderHead(reductions=2, heads=5), 24, COUNT, SPECS[0])
    with pytest.raises(InputError, match=r"halve the token width 20 to 2\.5"):
        build_head(TransEncoderHead(reductions=3, heads=1), 20, COUNT, SPECS[0])


@pytest.mark.parametrize(
    ("config", "width", "side", "millions"),
    [
        (TransEncoderHead(), 768, 32, 110.157),
        (TransEncoderHead(adaptor="conv"), 768, 64, 97.482),
        (TransEncoderHead(adaptor="conv", compress=1024), 4096, 64, 142.431),
    ],
    ids=["CLIP 256", "CLIP 512", "T5 512"],
)
def test_transencoder_has_the_published_parameters(
    config: TransEncoderHead, width: int, side: int, millions: float
) -> None:
    with torch.device("meta"):
        head = build_head(config, width, 77, LatentSpec(channels=4, height=side, width=side))
    # as many decimals as given
    assert count_parameters(head) / 1e6 == pytest.approx(millions, abs=5.1e-4)


def test_a_mismatch_names_both_shapes() -> None:
    made = LatentSpec(channels=4, height=32, width=32)
    latent = LatentSpec(channels=32, height=16, width=16)
    with pytest.raises(ValueError, match=r"\(4, 32, 32\).*\(32, 16, 16\).*linear_map"):
        ModelConfig(latent=latent, head=PooledHead(shape=made))
    ModelConfig(latent=latent, head=PooledHead(shape=made, linear_map=True))
    ModelConfig(latent=latent, head=PooledHead(shape=LatentSpec(channels=8, height=32, width=32)))


def test_linear_map_warns_of_drift_and_maps() -> None:
    made, latent = LatentSpec(channels=2, height=2, width=2), SPECS[1]
    with pytest.warns(UserWarning, match="drift"):
        head = build_head(PooledHead(hidden=16, shape=made, linear_map=True), WIDTH, COUNT, latent)
    mu, logvar = head(tokens())
    assert mu.shape == logvar.shape == (3, *latent.shape)
    (mu.sum() + logvar.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.map.parameters())


def test_reshape_neither_warns_nor_learns(recwarn: pytest.WarningsRecorder) -> None:
    layer = LatentMap(
        LatentSpec(channels=1, height=4, width=4), LatentSpec(channels=4, height=2, width=2)
    )
    assert not recwarn.list
    assert not list(layer.parameters())


def test_every_member_has_its_contract_test() -> None:
    assert {type(cls.config) for cls in HeadContract.__subclasses__()} == set(members(HeadConfig))


def test_posterior_clamps_and_draws() -> None:
    mu, logvar = (
        torch.full((2, 1, 2, 2), 3.0),
        torch.tensor([-50.0, 50.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2),
    )
    posterior = make_posterior(PosteriorConfig(), mu.bfloat16(), logvar)
    assert posterior.mu.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.logvar.flatten(1)[:, 0].tolist() == [-6.0, 6.0]
    noise: Tensor = torch.ones(2, 1, 2, 2)
    assert torch.allclose(posterior.sample(noise), 3 + (posterior.logvar / 2).exp())
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mu)
