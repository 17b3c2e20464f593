"""Photographs from scikit-image's wheel, enough for a demo without downloads.

Only one view of each scene is listed, because a second view would leak from training into evaluation.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from mirl_dist.data.degradations.degrade import Plane
from mirl_dist.errors import UserError

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "motorcycle_left": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
DISPARITIES = {"motorcycle_left": "motorcycle_disp.npz"}
DISPARITY_OFFSET = 31.086  # pixels between the principal points, from the calibration of Middlebury 2014's motorcycle


def locate(name: str) -> tuple[Path, Path | None]:
    """Return the paths of a photograph and of its disparity map.

    Raises UserError for an unknown name or a missing file.
    """
    if name not in PHOTOGRAPHS:
        raise UserError(f"no photograph is named '{name}'. Known are: {', '.join(PHOTOGRAPHS)}.")
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError("the photographs lie inside scikit-image, which is not installed: pip install scikit-image")
    folder = Path(package.origin).parent / "data"
    image, disparity = folder / PHOTOGRAPHS[name], folder / DISPARITIES[name] if name in DISPARITIES else None
    for path in filter(None, (image, disparity)):
        if not path.is_file():
            raise UserError(f"no file {path}. Install scikit-image's wheel, or name other photographs.")
    return image, disparity


def depth_from_disparity(disparity: Plane) -> Plane:
    """Compute depth in (0, 1], 1 at the farthest point. disparity: float (H, W) in pixels, non-finite where unknown.

    Unknown points are mostly occluded in one of the two views. So they take the smaller (farther) of the nearest known
    disparities to their left and right; in rows without any known value, the smallest of the image.
    Raises UserError without any finite disparity.
    """
    known = np.isfinite(disparity)
    if not known.any():
        raise UserError("a disparity map holds no finite value. Use another map, or none.")
    columns = np.arange(disparity.shape[1])
    left = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(known, columns, columns.size)[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(np.where(known, disparity, np.inf), ((0, 0), (1, 1)), constant_values=np.inf)
    rows = np.arange(disparity.shape[0])[:, None]
    filled = np.minimum(padded[rows, left + 1], padded[rows, right + 1])
    filled = np.where(np.isfinite(filled), filled, disparity[known].min())
    depth = 1 / (filled + DISPARITY_OFFSET)
    far: Plane = (depth / depth.max()).astype(np.float64)
    return far


def depth(height: int, width: int, disparity: Path | None) -> Plane:
    """Return the depth of an image, float64 (height, width) in [0, 1]: from its disparity map, or else a placeholder.

    The placeholder is independent of the scene: linear from 0.1 at the lower border to 1 at the upper.
    """
    if disparity is None:
        return np.repeat(np.linspace(1.0, 0.1, height)[:, None], width, axis=1)
    with np.load(disparity, allow_pickle=False) as file:
        return depth_from_disparity(file[file.files[0]].astype(np.float64))
