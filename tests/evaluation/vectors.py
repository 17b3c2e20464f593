"""The pair of images on which reference values of PSNR and SSIM were computed elsewhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


def reference_pair() -> tuple[Image, Image]:
    """A restored and a clean image (48, 64, 3) made of sines and an integer hash: no generator, no file."""
    row, column, channel = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    waves = 0.5 + 0.25 * np.sin(column / 7 + channel) + 0.2 * np.cos(row / 5 - 0.5 * channel)
    clean = np.round(255 * waves) / 255
    index = np.arange(clean.size, dtype=np.int64) % 1000003
    hashed = (611953 * index * index + 350377 * index + 104729 * 5 + 1299709) % 1000003
    restored = np.clip(clean + 0.15 * (hashed / 1000003 - 0.5).reshape(clean.shape), 0, 1)
    return restored.astype(np.float32), clean.astype(np.float32)
