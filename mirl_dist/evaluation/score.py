"""Defines the score of one image, and that of one task on one evaluation set."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

_Decibel = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Likeness = Annotated[float, Field(ge=-1 - 1e-6, le=1 + 1e-6, allow_inf_nan=False)]  # tolerance: rounding of means


class ImageScore(NamedTuple):
    """The score of one image by one protocol. name: 'task/set'; image: sample key; degraded_*: of the input."""

    protocol: str
    name: str
    image: str
    psnr: float
    ssim: float
    degraded_psnr: float
    degraded_ssim: float


class Score(BaseModel):
    """Mean PSNR and SSIM of one task on one set.

    psnr: in dB, at most 100 (metrics.PSNR_CEILING_DB); ssim: in [-1, 1]; degraded_*: of the degraded input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    psnr: _Decibel
    ssim: _Likeness
    degraded_psnr: _Decibel
    degraded_ssim: _Likeness
    images: PositiveInt


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect scores."""
    return {name: metadata.version(name) for name in ("numpy", "scikit-image")}
