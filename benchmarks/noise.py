"""Sources that are wrong by known amounts, for ``agreement_noise.py``.

``predict`` makes a source from the truth, in this order: boundary, missed objects, invented
objects, confidence, flipped pixels. With D the distance in pixels to the boundary that it drew, the
logit of a predicted label is

    |z| = k min(D / 0.6, 6) exp(n / 2) u        u ~ U(0.5, 1) on wrong pixels, else 1

where n is smooth noise of unit variance, u is drawn once an image and k is the over-confidence.
So a source is sure away from its boundary, less sure where it is wrong, yet often sure of errors. A
flipped pixel keeps the confidence of its place. Slope and height are those of ``vit_t`` on the
demo's images, whose errors too are nearly as sure as right pixels at the same distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, shift

Masks = NDArray[np.bool_]  # (N, S, S), True = foreground
Field = NDArray[np.float32]  # (N, S, S)

SOFTNESS_PX = 0.6  # distance over which a logit grows by 1
HIGHEST_LOGIT = 6.0
NOISE_SIGMA = 1 / 8  # of the confidence's smooth noise, in sides of the image
DOUBT = (0.5, 1.0)  # range of u
BLOB_PX = 8  # radius of an invented object


@dataclass(frozen=True)
class Errors:
    """How a source errs; by default it is right everywhere."""

    shift: float = 0.0  # px, of the boundary
    missed: float = 0.0  # share of images whose object is not found
    invented: float = 0.0  # share of images with a second object
    flips: float = 0.0  # share of pixels
    sharpness: float = 1.0  # k, above 1 for over-confidence


def signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the distance (S, S) of pixel centres to the boundary, px, positive inside.

    Pixels beside the boundary are half a pixel away from it; without a boundary every pixel is one
    side of the image away.
    """
    if mask.all() or not mask.any():
        return np.where(mask, float(len(mask)), -float(len(mask)))
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    return np.asarray(np.where(mask, inside - 0.5, 0.5 - outside))


def shift_boundary(masks: Masks, pixels: float, rng: np.random.Generator) -> Masks:
    """Grow, shrink or move every object by ``pixels``, by chance a third of the images each."""
    kinds = rng.integers(3, size=len(masks))
    angles = rng.uniform(0, 2 * np.pi, len(masks))
    out = masks.copy()
    for i, (mask, kind, angle) in enumerate(zip(masks, kinds, angles, strict=True)):
        if pixels == 0:
            continue
        if kind == 2:
            by = (pixels * np.sin(angle), pixels * np.cos(angle))
            out[i] = shift(mask.astype(np.float32), by, order=1) >= 0.5
        else:
            out[i] = signed_distance(mask) > (-pixels if kind == 0 else pixels)
    return out


def miss_objects(masks: Masks, share: float, rng: np.random.Generator) -> Masks:
    """Empty ``round(share N)`` of the masks."""
    out = masks.copy()
    out[rng.permutation(len(masks))[: round(share * len(masks))]] = False
    return out


def invent_objects(masks: Masks, share: float, rng: np.random.Generator, *, truth: Masks) -> Masks:
    """Add a disc of radius ``BLOB_PX`` to ``round(share N)`` of the masks, off the true object.

    Its centre is uniform over the places where it would not come within 2 px of the object; where
    there is none, the farthest pixel, and what would lie on the object is left out.
    """
    out = masks.copy()
    chosen, places = rng.permutation(len(masks)), rng.random(len(masks))
    y, x = np.indices(masks.shape[1:])
    for i in chosen[: round(share * len(masks))]:
        away = -signed_distance(truth[i])
        fits = np.argwhere(away >= min(BLOB_PX + 2, away.max()))
        cy, cx = fits[int(places[i] * len(fits))]
        out[i] |= (np.hypot(y - cy, x - cx) <= BLOB_PX) & ~truth[i]
    return out


def flip_pixels(labels: Masks, share: float, rng: np.random.Generator) -> Masks:
    """Invert each pixel with probability ``share``, independently."""
    return labels ^ (rng.random(labels.shape) < share)


def confidence_logits(labels: Masks, rng: np.random.Generator) -> Field:
    """Return ``min(D / SOFTNESS_PX, HIGHEST_LOGIT) exp(n / 2)``, D from the labels' boundary."""
    distance = np.abs(np.stack([signed_distance(mask) for mask in labels]))
    noise = rng.standard_normal(labels.shape, np.float32)
    sigma = NOISE_SIGMA * labels.shape[1]
    noise = gaussian_filter(noise, (0, sigma, sigma), mode="wrap")
    noise /= noise.std()
    logits = np.minimum(distance / SOFTNESS_PX, HIGHEST_LOGIT) * np.exp(noise / 2)
    return np.asarray(logits, np.float32)


def predict(truth: Masks, errors: Errors, rng: np.random.Generator) -> Field:
    """Return a source's foreground probability (N, S, S) in 0..1; its label is 1 above one half.

    A stream gives the same draws whatever the levels are, so that levels differ in nothing else.
    """
    labels = shift_boundary(truth, errors.shift, rng)
    labels = miss_objects(labels, errors.missed, rng)
    labels = invent_objects(labels, errors.invented, rng, truth=truth)
    logits = errors.sharpness * confidence_logits(labels, rng)
    labels = flip_pixels(labels, errors.flips, rng)
    doubt = rng.uniform(*DOUBT, (len(truth), 1, 1))
    logits = logits * np.where(labels != truth, doubt, 1.0)
    return np.asarray(1 / (1 + np.exp(np.where(labels, -logits, logits))), np.float32)
