"""What a model is made of: text side, head, posterior, velocity network, autoencoder, semantic
tower.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config, LatentSpec
from flowray.config.errors import RuleError
from flowray.config.paths import ModelPath, OptionalModel

PositiveInt = Annotated[int, Field(gt=0)]


class ConnectorConfig(Config):
    """Trainable bidirectional layers between the frozen text model and the head (OpenUni: 6,
    MetaQuery: 24), then a linear to `out`.

    style: `siglip` (LayerNorm, biases, tanh-GELU MLP) or `qwen2` (RMSNorm, gated SiLU MLP without
    biases).
    """

    layers: PositiveInt = 6
    hidden: PositiveInt = 896
    intermediate: PositiveInt = 3072
    heads: PositiveInt = 14
    out: PositiveInt = 2304
    style: Literal["siglip", "qwen2"] = "siglip"
    qk_norm: bool = False

    @model_validator(mode="after")
    def _divides(self) -> ConnectorConfig:
        if self.hidden % self.heads:
            raise RuleError(
                f"hidden {self.hidden} must be a multiple of heads {self.heads}", "hidden", "heads"
            )
        return self


class FrozenText(Config):
    """What both kinds of text model share.

    dtype: of the frozen weights; tokens and whatever trains stay fp32. width, parameters: hidden
    size and parameter count of the frozen model, so that `--plan` works where its weights are not;
    a width that the weights do not have is an error.
    """

    kind: Literal["causal_lm", "encoder"]
    path: ModelPath
    max_tokens: PositiveInt
    dtype: Literal["fp32", "bf16"] = "fp32"
    width: PositiveInt | None = None
    parameters: PositiveInt | None = None
    connector: ConnectorConfig | None = None


class CausalText(FrozenText):
    """A frozen causal language model, or the one in a vision-language model, with learnable meta
    queries after the prompt (OpenUni).

    path: `embedded` for the small model shipped with flowray, a folder that transformers can load,
    or a hub name that is on this machine (docs/models.md).
    chat: put the template into the tokenizer's own chat template as the user's words, after
    `system` if given, and `suffix` after the opening of the reply (OpenUni: template `Generate an
    image: {prompt}`, suffix `<img>`).
    """

    kind: Literal["causal_lm"] = "causal_lm"
    path: ModelPath = "embedded"
    max_tokens: PositiveInt = 40
    queries: PositiveInt = 256
    template: str = "{prompt}"
    chat: bool = False
    system: str | None = None
    suffix: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens a head gets."""
        return self.queries

    @model_validator(mode="after")
    def _template_has_prompt(self) -> CausalText:
        if "{prompt}" not in self.template:
            raise RuleError("the template must contain {prompt}", "template")
        if not self.chat and (self.system is not None or self.suffix):
            raise RuleError(
                "system and suffix belong to the chat template: set chat: true, or write them into"
                " template",
                "system",
                "suffix",
                "chat",
                "template",
            )
        return self


class EncoderText(FrozenText):
    """A frozen text encoder (CLIP, T5, BERT, ...): its last hidden states, one token per position,
    padding masked.

    pad_to_max: always max_tokens positions, for heads that flatten them (CrossFlow), else as many
    as the longest prompt has.
    """

    kind: Literal["encoder"] = "encoder"
    path: ModelPath
    max_tokens: PositiveInt = 77
    scale: float = Field(1.0, gt=0, description="multiplies the tokens (CrossFlow: 10 for T5)")
    pad_to_max: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens a head gets at most."""
        return self.max_tokens


TextConfig = Annotated[CausalText | EncoderText, Field(discriminator="kind")]


class _Head(Config):
    """What every head has.

    shape: what the head makes, model.latent unless given. A shape of as many values is reshaped;
    one of another size is an error unless linear_map allows a learnt linear map, which lets the
    source drift from what the head was trained to make.
    """

    kind: Literal["pooled", "grid", "conv", "transencoder"]
    shape: LatentSpec | None = None
    linear_map: bool = False


class PooledHead(_Head):
    """Mean-pooled tokens through an MLP to every latent value at once: the baseline,
    without a spatial prior.
    """

    kind: Literal["pooled"] = "pooled"
    hidden: PositiveInt = 512
    layers: Annotated[int, Field(ge=1)] = 3


class GridHead(_Head):
    """A learnable H x W query grid that cross-attends to the tokens, 2-D positions, depthwise
    convolutions.
    """

    kind: Literal["grid"] = "grid"
    hidden: PositiveInt = 128
    heads: PositiveInt = 4
    layers: PositiveInt = 2
    convs: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _divides(self) -> GridHead:
        if self.hidden % self.heads or self.hidden % 4:
            raise RuleError(
                f"hidden {self.hidden} must be a multiple of heads {self.heads} and of 4",
                "hidden",
                "heads",
            )
        return self


class ConvHead(_Head):
    """Pooled tokens through an MLP to (hidden, H, W), then 3x3 convolutions: locality with the
    least change.
    """

    kind: Literal["conv"] = "conv"
    hidden: PositiveInt = 32
    mlp: PositiveInt = 256
    layers: PositiveInt = 2


class TransEncoderHead(_Head):
    """CrossFlow's text variational encoder: post-norm layers, then layers that halve the width,
    then all tokens flattened.

    compress: width to which two linear layers bring wider tokens first (CrossFlow: 1024 for T5's
    4096). adaptor: from the flat tokens to the latent, one `linear`, or `conv`, by a linear of
    width `hidden` to `planes` images of its size and three convolutions.
    """

    kind: Literal["transencoder"] = "transencoder"
    layers: Annotated[int, Field(ge=0)] = 11
    reductions: Annotated[int, Field(ge=0)] = 3
    heads: PositiveInt = 8
    ffn: PositiveInt = 1024
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="CrossFlow has 0.1; each rank draws its own, so more ranks draw otherwise",
    )
    compress: PositiveInt | None = None
    adaptor: Literal["linear", "conv"] = "linear"
    hidden: PositiveInt = 4096
    planes: PositiveInt = 1


HeadConfig = Annotated[
    PooledHead | GridHead | ConvHead | TransEncoderHead, Field(discriminator="kind")
]


class PosteriorConfig(Config):
    """Bounds of the source's log-variance."""

    logvar_min: float = -6.0
    logvar_max: float = 6.0

    @model_validator(mode="after")
    def _ordered(self) -> PosteriorConfig:
        if self.logvar_min >= self.logvar_max:
            raise RuleError(
                f"logvar_min {self.logvar_min} must lie below logvar_max {self.logvar_max}",
                "logvar_min",
                "logvar_max",
            )
        return self


class TimeEmbeddingConfig(Config):
    """How a DiT sees the time: a sinusoid of the time code 4 - 8t, or of t itself (CrossFlow's
    DiT), then an MLP.

    bound: what keeps its amplitude down, a LayerNorm at the end or small initial weights.
    """

    of: Literal["time_code", "t"] = "time_code"
    frequencies: Annotated[int, Field(gt=0, multiple_of=2)] = 128
    bound: Literal["layer_norm", "small_init"] = "layer_norm"


class DiTVelocity(Config):
    """Diffusion transformer with adaLN-zero on the 1-D time code and the null indicator (Peebles
    and Xie 2023).

    indicator: of null samples, as an embedding beside the time's, or as one prepended token.
    """

    kind: Literal["dit"] = "dit"
    patch: PositiveInt = 1
    width: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: float = Field(4.0, gt=0)
    indicator: Literal["embedding", "token"] = "embedding"
    time: TimeEmbeddingConfig = TimeEmbeddingConfig()
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _divides(self) -> DiTVelocity:
        if self.width % self.heads or self.width % 4:
            raise RuleError(
                f"width {self.width} must be a multiple of heads {self.heads} and of 4",
                "width",
                "heads",
            )
        return self


class DiMRVelocity(Config):
    """Multi-resolution network (DiMR): a transformer at the lowest resolution, ConvNeXt stages
    above, each twice as fine.

    widths, depths and level_weights have one entry a stage, lowest resolution first; depths are odd
    (in, middle, out). The transformer's patch follows from the number of stages: 2 for two, 4 for
    three.
    """

    kind: Literal["dimr"] = "dimr"
    widths: tuple[PositiveInt, ...] = (128, 64)
    depths: tuple[PositiveInt, ...] = (5, 3)
    level_weights: tuple[float, ...] = Field(
        (0.25, 1.0), description="loss weight of every stage's velocity; the last is 1"
    )
    heads: PositiveInt = 4
    mlp_ratio: float = Field(2.0, gt=0)
    kernel: PositiveInt = 7
    gradient_checkpointing: bool = False

    @property
    def patch(self) -> int:
        """Side of the lowest stage's patches."""
        return 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _stages_agree(self) -> DiMRVelocity:
        stages = {len(self.widths), len(self.depths), len(self.level_weights)}
        if len(stages) > 1 or 0 in stages:
            raise RuleError(
                f"widths {self.widths}, depths {self.depths} and level_weights {self.level_weights}"
                " must be as many",
                "widths",
                "depths",
                "level_weights",
            )
        if not all(depth % 2 for depth in self.depths):
            raise RuleError(
                f"depths {self.depths} must be odd: as many blocks in as out, and one between",
                "depths",
            )
        if self.widths[0] % self.heads:
            raise RuleError(
                f"the first of widths {self.widths} must be a multiple of heads {self.heads}",
                "widths",
                "heads",
            )
        if self.kernel % 2 == 0:
            raise RuleError(f"kernel {self.kernel} must be odd", "kernel")
        if min(self.level_weights) < 0 or self.level_weights[-1] != 1:
            raise RuleError(
                f"level_weights {self.level_weights} must be >= 0 and end in 1 (loss.flow.weight"
                " scales them all)",
                "level_weights",
            )
        return self


VelocityConfig = Annotated[DiTVelocity | DiMRVelocity, Field(discriminator="kind")]


class KLAutoencoder(Config):
    """diffusers' AutoencoderKL. path: `embedded`, a folder, a hub name that is on this machine, or
    one file of Stable Diffusion's.

    The scale and shift come from its config unless given; one file has none, so there the scale
    must be.

    parameters: its parameter count, for a plan where its weights are not.
    """

    kind: Literal["kl"] = "kl"
    path: ModelPath = "embedded"
    scaling_factor: float | None = Field(None, gt=0)
    shift_factor: float | None = None
    parameters: PositiveInt | None = None


class DCAutoencoder(Config):
    """diffusers' AutoencoderDC (deterministic). An f32c32 whose own config has no scaling_factor,
    or 1.0, gets SANA's 0.41407.

    parameters: its parameter count, for a plan where its weights are not.
    """

    kind: Literal["dc"] = "dc"
    path: ModelPath
    scaling_factor: float | None = Field(None, gt=0)
    parameters: PositiveInt | None = None


AutoencoderConfig = Annotated[KLAutoencoder | DCAutoencoder, Field(discriminator="kind")]


class VisionDims(Config):
    """Dimensions of a vision transformer, for a plan without its weights or a tower trained from
    scratch.
    """

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp: PositiveInt
    image: PositiveInt = Field(description="side of the picture, px")
    patch: PositiveInt


class _ImageNet(Config):
    """A picture encoder in transformers' format.

    path: folder or hub name; dims: what it is made of, where there is no path.
    """

    path: OptionalModel = None
    dims: VisionDims | None = None

    @model_validator(mode="after")
    def _known(self) -> _ImageNet:
        if self.path is None and self.dims is None:
            raise RuleError(
                "a picture encoder needs a path, or dims where it starts from random weights",
                "path",
                "dims",
            )
        return self


class SiglipNet(_ImageNet):
    """SigLIP's image tower (arXiv 2303.15343); pooled: its attention head."""

    kind: Literal["siglip"] = "siglip"


class ClipNet(_ImageNet):
    """CLIP's image tower (arXiv 2103.00020); pooled: the class token, before the projection."""

    kind: Literal["clip"] = "clip"


class DinoV2Net(_ImageNet):
    """DINOv2 (arXiv 2304.07193), with or without register tokens; pooled: the class token."""

    kind: Literal["dinov2"] = "dinov2"


ImageNetConfig = Annotated[SiglipNet | ClipNet | DinoV2Net, Field(discriminator="kind")]


class TowerConfig(Config):
    """The small trainable image tower of the contrastive loss, on z1, and a projection of z0 of
    the same form.
    """

    kind: Literal["small"] = "small"
    hidden: PositiveInt = 64
    dim: PositiveInt = 128


class ImageTower(Config):
    """SigLIP's or CLIP's image tower on the decoded z1, against z0 itself, flattened (CrossFlow).

    output: how its pooled feature becomes a vector of the latent's size: `mlp` of width `hidden`,
    or `adaptor`, two linear layers and three convolutions (CrossFlow at 512 px).
    """

    kind: Literal["image"] = "image"
    net: ImageNetConfig = SiglipNet(path="google/siglip-large-patch16-256")
    frozen: bool = False
    output: Literal["mlp", "adaptor"] = "mlp"
    hidden: PositiveInt = 4096

    @model_validator(mode="after")
    def _has_weights(self) -> ImageTower:
        if self.frozen and self.net.path is None:
            raise RuleError(
                "a frozen tower without net.path would be random for ever; give the path, or"
                " frozen: false",
                "frozen",
                "net.path",
            )
        return self


SemanticConfig = Annotated[TowerConfig | ImageTower, Field(discriminator="kind")]


class ModelConfig(Config):
    """Every part of the model, and the latent shape they agree on."""

    latent: LatentSpec = LatentSpec()
    text: TextConfig = CausalText()
    head: HeadConfig = GridHead()
    posterior: PosteriorConfig = PosteriorConfig()
    velocity: VelocityConfig = DiTVelocity()
    autoencoder: AutoencoderConfig = KLAutoencoder()
    semantic: SemanticConfig = TowerConfig()

    @model_validator(mode="after")
    def _patches_fit(self) -> ModelConfig:
        patch, latent = self.velocity.patch, self.latent
        made = self.head.shape or latent
        if made.dims != latent.dims and not self.head.linear_map:
            raise RuleError(
                f"head.shape {made.shape} has {made.dims} values and cannot be reshaped to the"
                f" latent {latent.shape} of {latent.dims}; make them agree, or set head.linear_map"
                " true for a learnt linear map (the source then drifts)",
                "head.shape",
                "head.linear_map",
            )
        if latent.height % patch or latent.width % patch:
            raise RuleError(
                f"velocity.patch {patch} must divide the latent's {latent.height} x {latent.width}",
                "velocity.patch",
            )
        return self
