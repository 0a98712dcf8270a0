"""Whether a confidence means what it says: reliability by bins, and its error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 15


class Reliability:
    """How often pixels of a confidence are right, in 15 bins of equal width; additive."""

    def __init__(self) -> None:
        self.pixels, self.confidence, self.hits = np.zeros((3, ECE_BINS))  # sums by bin

    def add(self, confidence: NDArray[np.float32], hit: NDArray[np.bool_]) -> None:
        """Count pixels (n,): the probability of the predicted class, and whether it was right."""
        index = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
        self.pixels += np.bincount(index, minlength=ECE_BINS)
        self.confidence += np.bincount(index, weights=confidence, minlength=ECE_BINS)
        self.hits += np.bincount(index[hit], minlength=ECE_BINS)

    def error(self) -> float:
        """Return the expected calibration error (Naeini et al., 2015), 0..1.

        Mean over bins of |share of hits - mean confidence|, weighted by the bin's share of pixels.
        """
        return float(np.abs(self.hits - self.confidence).sum() / self.pixels.sum())

    def bins(self) -> dict[str, list[Any]]:
        """Return each bin's ``pixels``, mean ``confidence`` and ``accuracy`` (None where empty)."""
        sums = {"confidence": self.confidence, "accuracy": self.hits}
        means = {
            name: [float(s / n) if n else None for s, n in zip(values, self.pixels, strict=True)]
            for name, values in sums.items()
        }
        return {"pixels": self.pixels.astype(int).tolist(), **means}
