"""What a model is made of: text side, head, posterior, velocity network, autoencoder, semantic tower."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config, LatentSpec

PositiveInt = Annotated[int, Field(gt=0)]


class CausalText(Config):
    """A frozen causal language model with learnable meta queries appended after the prompt (OpenUni).

    path: a folder or hub name that transformers can load, or `embedded` for the small model shipped with flowray.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    path: str = "embedded"
    queries: PositiveInt = 16
    max_tokens: PositiveInt = 40
    template: str = "{prompt}"

    @model_validator(mode="after")
    def _template_has_prompt(self) -> CausalText:
        if "{prompt}" not in self.template:
            raise ValueError("the template must contain {prompt}")
        return self


class EncoderText(Config):
    """A frozen bidirectional text encoder (CLIP, T5, BERT, ...): its last hidden states, one token per position, padding masked."""

    kind: Literal["encoder"] = "encoder"
    path: str
    max_tokens: PositiveInt = 77
    scale: float = Field(1.0, gt=0, description="multiplies the tokens (CrossFlow: 10 for T5)")


TextConfig = Annotated[CausalText | EncoderText, Field(discriminator="kind")]


class PooledHead(Config):
    """Mean-pooled tokens through an MLP to every latent value at once: the logs' baseline, without a spatial prior."""

    kind: Literal["pooled"] = "pooled"
    hidden: PositiveInt = 512
    layers: Annotated[int, Field(ge=1)] = 3


class GridHead(Config):
    """A learnable H x W query grid that cross-attends to the tokens, 2-D positions, depthwise convolutions."""

    kind: Literal["grid"] = "grid"
    hidden: PositiveInt = 128
    heads: PositiveInt = 4
    layers: PositiveInt = 2
    convs: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _divides(self) -> GridHead:
        if self.hidden % self.heads or self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads} and of 4")
        return self


class ConvHead(Config):
    """Pooled tokens through an MLP to (hidden, H, W), then 3x3 convolutions: locality with the least change."""

    kind: Literal["conv"] = "conv"
    hidden: PositiveInt = 32
    mlp: PositiveInt = 256
    layers: PositiveInt = 2


HeadConfig = Annotated[PooledHead | GridHead | ConvHead, Field(discriminator="kind")]


class PosteriorConfig(Config):
    """Bounds of the source's log-variance; the logs clamp it to [-6, 6]."""

    logvar_min: float = -6.0
    logvar_max: float = 6.0

    @model_validator(mode="after")
    def _ordered(self) -> PosteriorConfig:
        if self.logvar_min >= self.logvar_max:
            raise ValueError(f"logvar_min {self.logvar_min} must lie below logvar_max {self.logvar_max}")
        return self


class DiTVelocity(Config):
    """Diffusion transformer with adaLN-zero on the 1-D time code and the null indicator (Peebles and Xie 2023)."""

    kind: Literal["dit"] = "dit"
    patch: PositiveInt = 1
    width: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> DiTVelocity:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        return self


VelocityConfig = DiTVelocity  # becomes an Annotated union with the second network


class KLAutoencoder(Config):
    """diffusers' AutoencoderKL. path: folder, hub name or `embedded`; the scale and shift come from its config unless given."""

    kind: Literal["kl"] = "kl"
    path: str = "embedded"
    scaling_factor: float | None = Field(None, gt=0)
    shift_factor: float | None = None


class DCAutoencoder(Config):
    """diffusers' AutoencoderDC (deterministic). SANA's f32c32 has scaling_factor 0.41407; its config may say 1.0."""

    kind: Literal["dc"] = "dc"
    path: str
    scaling_factor: float | None = Field(None, gt=0)


AutoencoderConfig = Annotated[KLAutoencoder | DCAutoencoder, Field(discriminator="kind")]


class TowerConfig(Config):
    """The small trainable image tower of the contrastive loss, on z1."""

    hidden: PositiveInt = 64
    dim: PositiveInt = 128


class ModelConfig(Config):
    """Every part of the model, and the latent shape they agree on."""

    latent: LatentSpec = LatentSpec()
    text: TextConfig = CausalText()
    head: HeadConfig = GridHead()
    posterior: PosteriorConfig = PosteriorConfig()
    velocity: VelocityConfig = DiTVelocity()
    autoencoder: AutoencoderConfig = KLAutoencoder()
    semantic: TowerConfig = TowerConfig()

    @model_validator(mode="after")
    def _patches_fit(self) -> ModelConfig:
        patch, latent = self.velocity.patch, self.latent
        if latent.height % patch or latent.width % patch:
            raise ValueError(f"velocity.patch {patch} must divide the latent's {latent.height} x {latent.width}")
        return self
