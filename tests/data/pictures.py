"""Small pictures as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3


def save(path: Path, values: NDArray[np.generic], **options: object) -> Path:
    """Write ``values`` to ``path``, as Pillow's ``options`` say, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)  # type: ignore[arg-type]
    return path
