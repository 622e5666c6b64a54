"""The trainable whole: captions -> source z0 -> velocity, with the autoencoder beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowray.config.losses import LossConfig
from flowray.config.model import ModelConfig
from flowray.model.heads import build_head
from flowray.model.layers import boxes
from flowray.model.levels import time_of
from flowray.model.posterior import Posterior, make_posterior, standard_normal
from flowray.model.semantic import Semantics
from flowray.model.text import TextModel, TextTokens, load_text, planned_text
from flowray.model.velocity import build_velocity


class Source(NamedTuple):
    """Where the paths of captions begin: q(z0 | caption), one draw of it (B, C, H, W), and the
    tokens that a conditioned velocity network reads; None for one that is not.
    """

    posterior: Posterior
    z0: Tensor
    text: TextTokens | None

    def rows(self, indices: Tensor | slice) -> Source:
        """The captions at `indices`."""
        text = None if self.text is None else self.text.rows(indices)
        return Source(self.posterior.rows(indices), self.z0[indices], text)

    @classmethod
    def joined(cls, parts: Sequence[Source]) -> Source:
        """The captions of all, whose tokens have one length."""
        mus, logvars = ([getattr(p.posterior, x) for p in parts] for x in ("mu", "logvar"))
        posterior = Posterior(torch.cat(mus), torch.cat(logvars), parts[0].posterior.amplitude)
        texts = [part.text for part in parts if part.text is not None]
        text = TextTokens(*map(torch.cat, zip(*texts, strict=True))) if texts else None
        return cls(posterior, torch.cat([part.z0 for part in parts]), text)


class FlowCore(nn.Module):
    """What pictures are made with: text side, head (None where the source is noise) and velocity
    network.

    The autoencoder is not in here: it is frozen, has no part in a training step on cached latents,
    and is loaded where pictures are made.
    """

    def __init__(self, config: ModelConfig, text: TextModel):
        super().__init__()
        self.config = config
        self.text = text
        self.head = (
            build_head(config.head, text.width, config.text.tokens, config.latent)
            if config.source.kind == "text"
            else None
        )
        self.drops = config.source.kind == "text" and config.source.drop_null
        self.velocity = build_velocity(config.velocity, config.latent, text.width)

    def posterior(self, tokens: TextTokens) -> Posterior:
        """q(z0 | caption) in fp32, of the model's own size."""
        count, shape = len(tokens.mask), self.config.latent.shape
        if self.head is None:
            return standard_normal(count, shape, tokens.mask.device)
        mu, logvar = self.head(tokens)
        expected = (count, *shape)
        if mu.shape != expected:
            raise ValueError(
                f"the head made a text latent of shape {tuple(mu.shape)}, model.latent wants"
                f" {expected}"
            )
        amplitude = self.config.source.amplitude if self.config.source.kind == "text" else 1.0
        return make_posterior(self.config.posterior, mu, logvar, amplitude)

    def read(self, captions: Sequence[str]) -> TextTokens:
        """The tokens of captions, as the head and a conditioned velocity network have them."""
        tokens: TextTokens = self.text(self.text.tokenize(captions))
        return tokens

    def source(self, captions: Sequence[str], noise: Tensor) -> Source:
        """Where the paths of captions begin; noise (B, C, H, W), of the model's own size or that of
        a bucket.
        """
        tokens = self.read(captions)
        height, width = noise.shape[2:]
        posterior = self.posterior(tokens).of_size((height, width))
        return Source(
            posterior, posterior.sample(noise), tokens if self.velocity.conditioned else None
        )

    def levels(
        self, source: Source, x: Tensor, time_code: Tensor, null: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The velocity network's levels on samples of the captions of `source`; a batch of k times
        as many, as guidance makes it, has them k times over. kept: as `VelocityNet.levels` has it.

        With `model.source.drop_null` a null sample is seen in coordinates without its
        caption: x - (1 - t) mean, whose velocity lacks the mean too.
        """
        again = len(x) // len(source.z0)
        text = None if source.text is None else source.text.repeated(again)
        if not self.drops:
            return self.velocity.levels(x, time_code, null, text, kept)
        mean = source.posterior.mean.detach().repeat(again, 1, 1, 1)
        code = torch.where(null[:, None, None, None], mean, 0.0)
        left = 1 - time_of(time_code.float())[:, None, None, None]
        velocities = self.velocity.levels(x - left * code, time_code, null, text, kept)
        return tuple(v.float() - boxes(code, code.shape[-1] // v.shape[-1]) for v in velocities)

    def field(self, source: Source) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The velocity (x, time code, null) of samples of the captions of `source`."""
        return lambda x, time_code, null: self.levels(source, x, time_code, null)[-1]


class FlowModel(FlowCore):
    """What trains: a `FlowCore` and the networks of the semantic losses that are on.

    Only semantic losses that look at pictures bring an autoencoder, inside `semantic`.
    """

    def __init__(self, config: ModelConfig, loss: LossConfig, text: TextModel):
        super().__init__(config, text)
        self.semantic = Semantics(config, loss, self.velocity)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Named parameters that train, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_model(config: ModelConfig, loss: LossConfig, seed: int) -> FlowModel:
    """A fresh model whose initial weights depend on the seed alone; the global RNG is left as it
    was.
    """
    with torch.random.fork_rng(devices=[]):
        text = load_text(config.text)
        torch.manual_seed(seed)
        text.reset()
        return FlowModel(config, loss, text)


def planned_model(config: ModelConfig, loss: LossConfig) -> FlowModel:
    """The model on the meta device: every shape, no memory, no weights read. Of a text model its
    config.json is enough; without that it is left out, and the recipe must then say its `width`.
    """
    with torch.device("meta"):
        return FlowModel(config, loss, planned_text(config.text))


def part_sizes(model: FlowModel, *, trainable: bool | None = None) -> dict[str, int]:
    """Parameters of every part, disjoint, no totals: `head`, and one level deeper `text.*`,
    `velocity.*`, `semantic.*`.

    trainable: count only those that train, or only those that do not.
    """
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        top, inner, *_ = name.split(".")
        part = top if top == "head" else f"{top}.{inner}"
        parts[part] = parts.get(part, 0) + (
            parameter.numel() if trainable in (None, parameter.requires_grad) else 0
        )
    return parts
