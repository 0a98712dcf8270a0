"""What a training step draws: labelled batches of D_p, and two views of unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from pipeline.config import AugmentConfig
from pipeline.segmentation.augmentation import (
    LIGHT,
    STRONG,
    Photometry,
    change_appearance,
    random_affine,
    sampling_grid,
    warp_images,
    warp_labels,
)
from pipeline.stores.image_store import ImageSet


@dataclass(frozen=True)
class ClientData:
    """Images (N, 3, S, S) uint8 of one owner and what labels them, (N, S, S) uint8.

    ``masks`` and ``confidences`` come from the label store (SAM methods); for ``oracle`` the masks
    are the truth. Both are None where the method uses neither. A client's ``truth`` is there for an
    audit alone: it scores pseudo-labels and never trains anything.
    """

    name: str
    images: Tensor
    masks: Tensor | None = None
    confidences: Tensor | None = None
    truth: Tensor | None = None

    def first(self, count: int) -> ClientData:
        """Return the first ``count`` images with all that is known of them."""
        parts: Any = {k: v[:count] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **parts)


@dataclass(frozen=True)
class PublicSet:
    """D_p, which every client holds. Images (N, 3, S, S) uint8, labels (N, S, S) uint8."""

    images: Tensor  # of the training part
    labels: Tensor
    calibration: ClientData  # with the truth, and with SAM's labels where the method uses SAM
    groups: tuple[str, ...]  # of the calibration images


def as_tensor(stored: ImageSet) -> Tensor:
    """Return stored images as (N, 3, S, S) uint8."""
    return torch.from_numpy(stored.images).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Views:
    """Two views of an unlabelled batch with one geometry, and its labels under it."""

    weak: Tensor  # (B, 3, S, S) float 0..1
    strong: Tensor  # likewise
    masks: Tensor | None  # (B, S, S) int64
    confidences: Tensor | None  # (B, S, S) float32 probabilities
    truth: Tensor | None  # (B, S, S) int64


@dataclass(frozen=True)
class Sampling:
    """How batches are drawn, one after another."""

    size: int  # images of a batch
    generator: Generator  # goes on from batch to batch
    device: torch.device  # where batches are used
    augment: AugmentConfig

    @property
    def strong(self) -> Photometry:
        """The limits of a strong view's appearance."""
        return STRONG.times(self.augment.intensity)

    def choose(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw rows (size,) of ``images``, and where the pixels of their view come from."""
        chosen = _choose(len(images), self.size, self.generator)
        maps = random_affine(len(chosen), self.generator, settings=self.augment)
        return chosen, sampling_grid(maps, images)


def labelled_batch(public: PublicSet, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw an augmented labelled batch: images (B, 3, S, S) float 0..1, truth (B, S, S) int64."""
    chosen, grid = sampling.choose(public.images)
    images = warp_images(public.images[chosen].float() / 255, grid)
    images = change_appearance(images, sampling.strong, sampling.generator)
    truth = warp_labels(public.labels[chosen], grid).long()
    return images.to(sampling.device), truth.to(sampling.device)


def draw_views(client: ClientData, sampling: Sampling) -> Views:
    """Draw a weak and a strong view of some of the client's images."""
    chosen, grid = sampling.choose(client.images)
    base = warp_images(client.images[chosen].float() / 255, grid)
    weak = change_appearance(base, LIGHT, sampling.generator)
    strong = change_appearance(base, sampling.strong, sampling.generator)
    device = sampling.device

    def warped(values: Tensor | None) -> Tensor | None:
        return None if values is None else warp_labels(values[chosen], grid).to(device)

    masks, confidences, truth = map(warped, (client.masks, client.confidences, client.truth))
    return Views(
        weak=weak.to(device),
        strong=strong.to(device),
        masks=None if masks is None else masks.long(),
        # agreement never takes a probability as certain, so 0 and 255 may stand
        confidences=None if confidences is None else confidences.float() / 255,
        truth=None if truth is None else truth.long(),
    )


def _choose(count: int, size: int, generator: Generator) -> Tensor:
    """Draw ``size`` rows of ``count``, without repetition where there are enough."""
    rounds = -(-size // count)
    orders = [torch.randperm(count, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:size]
