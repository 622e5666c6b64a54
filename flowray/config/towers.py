"""Picture encoders: the semantic towers and the teachers of the losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowray.config.base import Config, PositiveInt
from flowray.config.errors import RuleError
from flowray.config.paths import OptionalModel


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
