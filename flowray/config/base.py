"""The base of every config class: strict, immutable, checked when made."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """A frozen, fully validated node of a recipe; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class LatentSpec(Config):
    """Shape of one latent, (channels, height, width); declared, never assumed."""

    channels: int = 4
    height: int = 8
    width: int = 8

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def dims(self) -> int:
        """Number of latent dimensions, C * H * W."""
        return self.channels * self.height * self.width
