"""How unlike its training images an image looks to a model.

The distance of early features, pooled over the image, to those of the training images (Mahalanobis,
after Lee et al., NeurIPS 2018). Features at stride 4 tell other kinds of images best, and sums over
all clients keep their own images from being called strange: docs/method.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import NotFiniteError
from pipeline.segmentation.model_spec import Likeness
from pipeline.segmentation.networks import normalise

_STAGE = 2  # of an encoder's features: those at stride 4, which every encoder has
_SHRINKAGE = 0.2  # of the correlations: few images would make directions look exact
_LEAST_SPREAD = 1e-6
_DIGITS = 6
_ROUNDING = 1e-9
_LARGEST = torch.finfo(torch.float32).max  # of a feature: sums of more would overflow


@dataclass(frozen=True)
class Moments:
    """Sums over the pooled features of ``count`` images: (C,) and (C, C), float64."""

    count: int
    sums: Tensor
    products: Tensor  # of f f^T

    def as_tensor(self) -> Tensor:
        """Return sums and, below them, products, (C+1, C)."""
        return torch.cat([self.sums[None], self.products])

    @classmethod
    def received(cls, count: int, values: Tensor | None, *, like: Moments) -> Moments | None:
        """Return what ``as_tensor`` joined, or None where no images can have such sums."""
        if values is None or values.shape != like.as_tensor().shape:
            return None
        if values.dtype != torch.float64 or not values.isfinite().all():
            return None
        found = cls(count, values[0], values[1:])
        if values.abs().max() > count * _LARGEST**2 or found.sums.abs().max() > count * _LARGEST:
            return None
        if not torch.equal(found.products, found.products.T):
            return None
        covariance = found.covariance()
        least = torch.linalg.eigvalsh(covariance)[0]
        if least < -_ROUNDING * found.products.diagonal().sum() / count:
            return None
        # beside a huge feature others could hide that cannot go together
        correlation, _ = _correlation(covariance)
        return found if torch.linalg.eigvalsh(correlation)[0] >= -_SHRINKAGE / 2 else None

    def covariance(self) -> Tensor:
        """Return the covariance (C, C) of the images' features."""
        mean = self.sums / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of images."""
        sums, products = self.sums + other.sums, self.products + other.products
        return Moments(self.count + other.count, sums, products)


@dataclass(frozen=True)
class Statistics:
    """Mean (C,) and whitening matrix (C, C) of pooled features, float64."""

    images: int
    mean: Tensor
    whitening: Tensor

    def as_tensor(self) -> Tensor:
        """Return the mean and, below it, the whitening matrix, (C+1, C)."""
        return torch.cat([self.mean[None], self.whitening])

    def with_threshold(self, threshold: float) -> Likeness:
        """Return what a model's description holds."""
        rows = [_short(row) for row in self.whitening]
        mean, least = _short(self.mean), 10.0**-_DIGITS
        return Likeness(
            images=self.images,
            mean=mean,
            whitening=tuple(rows),
            threshold=max(threshold, least),
        )


def _short(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())


def logits_and_features(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B, K+1, S, S) and pooled features (B, C) of normalised images (B, 3, S, S)."""
    parts: Any = model
    features = parts.encoder(inputs)
    logits = parts.segmentation_head(parts.decoder(features))
    return logits, features[_STAGE].mean(dim=(2, 3))


@torch.inference_mode()
def pooled_features(model: nn.Module, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return (N, C) float64 of uint8 images (N, 3, S, S), evaluation mode."""
    parts: Any = model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [
            parts.encoder(normalise(b.to(device).float() / 255))[_STAGE].mean(dim=(2, 3)).cpu()
            for b in images.split(batch_size)
        ]
    ).double()


def moments(features: Tensor) -> Moments:
    """Return the sums over features (N, C), float64."""
    products = features.T @ features
    return Moments(len(features), features.sum(dim=0), (products + products.T) / 2)


def statistics(parts: Sequence[Moments]) -> Statistics:
    """Join moments, in their order, to a mean and a whitening matrix.

    With standard deviations s and correlations R, W = L^T diag(1/s), where L L^T is the inverse of
    0.8 R + 0.2 I.

    Raises:
        NotFiniteError: features are so large that nothing can be told of their correlations.
    """
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    mean = total.sums / total.count
    covariance = total.covariance()
    correlation, spread = _correlation(covariance)
    identity = torch.eye(len(mean), dtype=torch.float64)
    shrunk = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * identity
    factor, failed = torch.linalg.cholesky_ex(torch.linalg.inv_ex(shrunk).inverse)
    if failed or not factor.isfinite().all():
        raise NotFiniteError(
            "the final model's features of the images are too large to be told apart: its training "
            "has broken down; see the warnings of its rounds, lower federate.learning_rate, or, "
            "where a client may mean harm, set federate.aggregation"
        )
    return Statistics(total.count, mean, factor.T / spread)


def _correlation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return correlations (C, C) and standard deviations (C,)."""
    spread = covariance.diagonal().clamp(min=_LEAST_SPREAD**2).sqrt()
    return covariance / torch.outer(spread, spread), spread


def distances(features: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Return the distance (N,) of features (N, C): around 1 for images like those behind it."""
    return ((features - mean) @ whitening.T).square().mean(dim=1).sqrt()


def threshold_of(found: Sequence[float]) -> float:
    """Return the distance beyond which an image is unlike, from each client's 95th percentile.

    The widest client decides, as its images were trained on too, but nobody by more than three
    times the median.
    """
    ordered = torch.tensor(sorted(found), dtype=torch.float64)
    return float(torch.minimum(ordered[-1], 3 * ordered.median()))


def usual_distance(features: Tensor, given: Statistics) -> float:
    """Return the 95th percentile of the distances of features (N, C)."""
    found = distances(features, given.mean, given.whitening)
    return float(torch.quantile(found, 0.95))
