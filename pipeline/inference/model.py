"""What predicts: frames in, class probabilities and distances out, whatever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


class Outputs(NamedTuple):
    """Of B frames: what a model says."""

    probabilities: NDArray[np.float32]  # (B, K+1, h, w) of the whole, squashed image
    distances: NDArray[np.float64] | None  # (B,) from the training images; None: cannot tell


class Model(Protocol):
    """A model that is ready to predict."""

    digest: str  # of all that decides its predictions
    num_classes: int  # K
    class_names: tuple[str, ...]  # of 1..K
    threshold: float  # of distances: beyond it an image is unlike the training images
    grey: bool  # whether it was trained on grey images alone

    def frame(self, image: Pixels) -> Pixels:
        """Return an image (H, W, 3) uint8 RGB as the model takes it; called on many threads."""

    def predict(self, frames: Sequence[Pixels]) -> Outputs:
        """Predict frames, all in one batch."""
