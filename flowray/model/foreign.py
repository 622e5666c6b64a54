"""A model that was made and trained elsewhere, in the form that flowray's probes, doctor, sampler
and evaluation take: an object with the methods of `Foreign`. docs/bring-your-own.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import (
    AdaLNCondition,
    DiTVelocity,
    ModelConfig,
    NoiseSource,
    PosteriorConfig,
    TextSource,
)
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import DETERMINISTIC_LOGVAR, Autoencoder
from flowray.model.latent import LatentScale, Moments
from flowray.model.levels import VelocityNet, checked, code_of, refuse_route, time_of
from flowray.model.text import TextModel, TextTokens

METHODS = ("encode_text", "encode_image", "velocity", "decode")


class Foreign(Protocol):
    """What an object must have. An nn.Module is put into eval mode and run where its weights lie;
    any other one is run on the CPU. Tensors are handed over in fp32.

    It may also have `posterior(text) -> (mu, logvar)`, each (B, C, H, W): paths then begin at z0 =
    mu + exp(logvar / 2) noise (CrossFlow). Without it they begin at noise, N(0, I) (OpenUni, SD3).
    """

    def encode_text(self, captions: Sequence[str]) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens of B captions (B, N, width), alone or with their mask (B, N) bool, True where
        there is one.
        """

    def encode_image(self, pictures: Tensor) -> Tensor:
        """The latents (B, C, H, W) that the velocity leads to, scaled as it was trained on them, of
        pictures (B, 3, height, width) in [-1, 1].
        """

    def velocity(self, x: Tensor, t: Tensor, null: Tensor, text: TextTokens) -> Tensor:
        """dx/dt (B, C, H, W) at x (B, C, H, W) and times t (B,), from 0 at the source to 1 at the
        picture. null: (B,) bool, True where the caption is to be left out, for guidance. text: as
        `encode_text` had it, `values` and `mask`.
        """

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, height, width), about [-1, 1], of such latents."""


def refuse_unlike(model: object) -> None:
    """InputError where an object lacks a method."""
    lacking = [name for name in METHODS if not callable(getattr(model, name, None))]
    if lacking:
        kind = type(model).__name__
        raise InputError(
            f"model: {kind} has no {' and no '.join(lacking)}; flowray.model.foreign.Foreign has"
            " what it needs"
        )


def device_of(model: object) -> torch.device:
    """Where its first parameter lies."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def _checked_shape(what: str, made: Any, want: tuple[int, ...]) -> Tensor:
    if not isinstance(made, Tensor) or made.shape != want:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise InputError(f"model.{what}: gave {got}, want a tensor {want}")
    return made


class _Held(nn.Module):
    """Holds the model, and a parameter that says where it lies: it may have none of its own."""

    def __init__(self, model: Foreign):
        super().__init__()
        device = device_of(model)
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model: Any = model


class _Source(_Held):
    def __init__(self, model: Foreign, latent: LatentSpec):
        super().__init__(model)
        self.latent = latent

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        want = (len(tokens.mask), *self.latent.shape)
        mu, logvar = self.model.posterior(tokens)
        return _checked_shape("posterior", mu, want), _checked_shape("posterior", logvar, want)


class _Velocity(_Held, VelocityNet):
    conditioned = True
    last_layers = "(?!)"  # which they are is not known

    def levels(
        self,
        x: Tensor,
        time_code: Tensor,
        null: Tensor,
        text: TextTokens | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        refuse_route(kept)
        t = time_of(checked(time_code).float()).clamp(0, 1)
        made = self.model.velocity(x, t, null, text)
        return (_checked_shape("velocity", made, tuple(x.shape)),)


class _Text(nn.Module):
    def whole_length(self) -> AbstractContextManager[None]:
        """Its prompts are padded as it pads them."""
        return nullcontext()


class ForeignModel(FlowModel):
    """A foreign model where a FlowModel is wanted. Its latents have the shape `latent`."""

    def __init__(self, model: Foreign, latent: LatentSpec):
        nn.Module.__init__(self)
        refuse_unlike(model)
        self.velocity = _Velocity(model)
        self.head = _Source(model, latent) if callable(getattr(model, "posterior", None)) else None
        self.config = ModelConfig(
            latent=latent,
            source=TextSource() if self.head is not None else NoiseSource(),
            posterior=PosteriorConfig(logvar_min=-30.0, logvar_max=20.0),
            # stands for a network that may read the caption
            velocity=DiTVelocity(condition=AdaLNCondition()),
        )
        self.drops, self.given = False, cast(Any, model)
        # tokens come from `read`, and no loss of flowray's has a network here
        self.text = cast(TextModel, _Text())
        self.semantic = cast(Any, nn.Module())

    def read(self, captions: Sequence[str]) -> TextTokens:
        made = self.given.encode_text(list(captions))
        values, mask = made if isinstance(made, tuple) else (made, None)
        if not isinstance(values, Tensor) or values.ndim != 3 or len(values) != len(captions):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"model.encode_text: gave {got}, want ({len(captions)}, N, width)")
        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return TextTokens(values, _checked_shape("encode_text", mask, values.shape[:2]).bool())


class ForeignAutoencoder(Autoencoder):
    """Its encode_image and decode where an Autoencoder is wanted. size: (height, width) in px of
    the pictures.
    """

    def __init__(self, model: Foreign, latent: LatentSpec, size: tuple[int, int]):
        nn.Module.__init__(self)
        refuse_unlike(model)
        self.held, self.size = _Held(model), size
        self.net = SimpleNamespace(config=None)  # its own is not known
        self.latent, self.scale = latent, LatentScale(1.0, 0.0, deterministic=True)

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.size

    @torch.no_grad()
    def encode_moments(self, pictures: Tensor) -> Moments:
        made = self.held.model.encode_image(pictures.to(self.held.place.device))
        z = _checked_shape("encode_image", made, (len(pictures), *self.latent.shape))
        return Moments(z, torch.full_like(z, DETERMINISTIC_LOGVAR))

    def decode_with_grad(self, z: Tensor) -> Tensor:
        made = self.held.model.decode(z)
        return _checked_shape("decode", made, (len(z), 3, *self.size))


class Brought(nn.Module):
    """A FlowModel and its autoencoder as a `Foreign`: one whose weights were read from elsewhere,
    such as CrossFlow's (flowray.model.crossflow), and that has no run. InputError for
    `model.source.drop_null`, whose null samples are not the network's alone.
    """

    def __init__(self, model: FlowModel, autoencoder: Autoencoder):
        super().__init__()
        if model.drops:
            raise InputError("model.source.drop_null: is not read without its run")
        self.model, self.autoencoder = model, autoencoder
        if model.head is not None:
            self.posterior = self._posterior

    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.model.read(captions)

    def _posterior(self, text: TextTokens) -> tuple[Tensor, Tensor]:
        made = self.model.posterior(text)
        return made.mean, made.logvar

    def encode_image(self, pictures: Tensor) -> Tensor:
        moments = self.autoencoder.encode_moments(pictures)
        return self.autoencoder.sample(moments, torch.zeros_like(moments.mean))

    def velocity(self, x: Tensor, t: Tensor, null: Tensor, text: TextTokens) -> Tensor:
        network = self.model.velocity
        made: Tensor = network(x, code_of(t), null, text if network.conditioned else None)
        return made

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z)


def latent_of(model: Foreign, pictures: Tensor) -> LatentSpec:
    """The shape of the latents that it makes of pictures (B, 3, height, width) in [-1, 1].

    InputError where `encode_image` makes no (B, C, H, W).
    """
    with torch.no_grad():
        made: Any = model.encode_image(pictures.to(device_of(model)))
    if not isinstance(made, Tensor) or made.ndim != 4 or len(made) != len(pictures):
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise InputError(f"model.encode_image: gave {got}, want ({len(pictures)}, C, H, W)")
    channels, height, width = made.shape[1:]
    return LatentSpec(channels=channels, height=height, width=width)
