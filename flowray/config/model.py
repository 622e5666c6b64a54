"""What a model is made of: text side, source, head, posterior, velocity network, autoencoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config, LatentSpec, PositiveInt
from flowray.config.errors import RuleError
from flowray.config.paths import ModelPath
from flowray.config.towers import SemanticConfig, TowerConfig


class ConnectorConfig(Config):
    """Trainable bidirectional layers between the frozen text model and what reads its tokens
    (OpenUni: 6, MetaQuery: 24), then a linear to `out`.

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

    dtype: of the frozen model, weights and passes, in training and sampling, whatever
    train.precision is; tokens and whatever trains stay fp32. width, parameters: hidden
    size and parameter count of the frozen model, so that `--plan` works where its weights are not;
    a width that the weights do not have is an error.

    cache: keep what the frozen model makes of each caption, so that it is computed once; with
    queries their prompt's keys and values. A resumed run then repeats an unbroken one to rounding,
    not bit for bit. cache_gib: at most so much, on the model's device.
    """

    kind: Literal["causal_lm", "encoder"]
    path: ModelPath
    max_tokens: PositiveInt
    dtype: Literal["fp32", "bf16"] = "fp32"
    width: PositiveInt | None = None
    parameters: PositiveInt | None = None
    connector: ConnectorConfig | None = None
    cache: bool = False
    cache_gib: float = Field(2.0, gt=0)


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

    pad_to_max: always max_tokens positions, for heads that flatten them, else as many as the
    longest prompt has; `seen`: padding is run as tokens are, without a mask (CrossFlow's CLIP).
    """

    kind: Literal["encoder"] = "encoder"
    path: ModelPath
    max_tokens: PositiveInt = 77
    scale: float = Field(1.0, gt=0, description="multiplies the tokens (CrossFlow: 10 for T5)")
    pad_to_max: bool | Literal["seen"] = False

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
    width `hidden` to `planes` images of its size and three convolutions. read_padding: flatten what
    the layers make of padding too (CrossFlow), which else is zero.
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
    read_padding: bool = False


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


class TextSource(Config):
    """Paths begin at z0 = amplitude mu + sigma noise; the head makes mu and sigma of the caption
    (CrossFlow).

    amplitude: how far the captions' codes stand apart against noise and pictures.
    drop_null: show the network a null sample without the caption's share of x_t, so that guidance
    leads away from what knows no caption; else as it is (CrossFlow).
    """

    kind: Literal["text"] = "text"
    amplitude: float = Field(1.0, gt=0)
    drop_null: bool = False


class NoiseSource(Config):
    """Paths begin at z0 ~ N(0, I), whatever the caption (FLUX, OpenUni, MetaQuery, PRX): no head,
    no posterior, and none of the losses on them; the caption comes in by `velocity.condition`.
    """

    kind: Literal["noise"] = "noise"


SourceConfig = Annotated[TextSource | NoiseSource, Field(discriminator="kind")]


class NoCondition(Config):
    """The velocity network reads x_t, the time and whether a sample is null."""

    kind: Literal["none"] = "none"


class AdaLNCondition(Config):
    """It reads the caption's pooled tokens too, beside the time's embedding (Peebles and Xie
    2023); a null sample has none.
    """

    kind: Literal["adaln"] = "adaln"


class CrossAttentionCondition(Config):
    """Each of its transformer blocks reads all of the caption's tokens (PixArt-alpha, arXiv
    2310.00426); a null sample has one learnt token instead.
    """

    kind: Literal["cross_attention"] = "cross_attention"


class TimeEmbeddingConfig(Config):
    """How a DiT sees the time: a sinusoid of the time code 4 - 8t, or of t itself (CrossFlow's
    DiT), then an MLP.

    bound: what keeps its amplitude down, a LayerNorm at the end or small initial weights.
    """

    of: Literal["time_code", "t"] = "time_code"
    frequencies: Annotated[int, Field(gt=0, multiple_of=2)] = 128
    bound: Literal["layer_norm", "small_init"] = "layer_norm"


class TokenRoute(Config):
    """In training alone a random part of a sample's tokens goes past the blocks in the middle and
    comes back behind them (TREAD, arXiv 2501.04765). Probes and pictures use every token.

    before, after: the blocks at either end that see every token (PRX: 2 and 3 of 16).
    """

    keep: float = Field(0.5, gt=0, lt=1, description="share of the tokens that the middle sees")
    before: Annotated[int, Field(ge=0)] = 2
    after: Annotated[int, Field(ge=0)] = 2

    def kept(self, tokens: int) -> int:
        """How many of a sample's tokens the middle sees, the same for every sample."""
        return max(1, round(self.keep * tokens))


class DiTVelocity(Config):
    """Diffusion transformer with adaLN-zero on the 1-D time code and the null indicator (Peebles
    and Xie 2023).

    indicator: of null samples, as an embedding beside the time's, or as one prepended token.
    condition: what else it knows of the caption than x_t.
    """

    kind: Literal["dit"] = "dit"
    patch: PositiveInt = 1
    width: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    mlp_ratio: float = Field(4.0, gt=0)
    indicator: Literal["embedding", "token"] = "embedding"
    time: TimeEmbeddingConfig = TimeEmbeddingConfig()
    condition: Annotated[
        NoCondition | AdaLNCondition | CrossAttentionCondition, Field(discriminator="kind")
    ] = NoCondition()
    gradient_checkpointing: bool = False
    route: TokenRoute | None = None

    @property
    def routed(self) -> range:
        """The blocks, counted from 0, that a part of the tokens goes past in training."""
        route = self.route
        return range(route.before, self.depth - route.after) if route else range(0)

    @model_validator(mode="after")
    def _divides(self) -> DiTVelocity:
        if self.route and not self.routed:
            raise RuleError(
                f"route goes past no block: before {self.route.before} and after"
                f" {self.route.after} must leave one of depth {self.depth}",
                "route.before",
                "route.after",
                "depth",
            )
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
    condition: Annotated[NoCondition | CrossAttentionCondition, Field(discriminator="kind")] = (
        NoCondition()
    )
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
    """diffusers' AutoencoderKL. path: `embedded` (for shapes and digits), `embedded_emoji` (for
    drawings on white), a folder, a hub name that is on this machine, or one file of Stable
    Diffusion's.

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


class ModelConfig(Config):
    """Every part of the model, and the latent shape they agree on."""

    latent: LatentSpec = LatentSpec()
    text: TextConfig = CausalText()
    source: SourceConfig = TextSource()
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

    @model_validator(mode="after")
    def _caption_comes_in(self) -> ModelConfig:
        if self.source.kind == "noise" and self.velocity.condition.kind == "none":
            raise RuleError(
                "source noise needs velocity.condition adaln or cross_attention: with none the"
                " caption would play no part",
                "source.kind",
                "velocity.condition",
            )
        return self
