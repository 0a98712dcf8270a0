"""What a training step draws: labelled batches of D_p, and two views of unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, Config
from pipeline.federation.streams import Streams
from pipeline.segmentation.augmentation import (
    LIGHT,
    STRONG,
    Photometry,
    change_appearance,
    is_grey,
    random_affine,
    sampling_grid,
    warp_images,
    warp_labels,
)
from pipeline.stores.image_store import ImageSet


@dataclass(frozen=True)
class ClientData:
    """Images (N, 3, S, S) uint8 of one owner and what labels them, (N, S, S) uint8.

    ``masks``, ``confidences`` and, of several classes where the settings ask for them,
    ``probabilities`` come from the label store (SAM methods); for ``oracle`` the masks are the
    truth. All are None where the method uses neither. ``target`` and ``weight`` are what a
    round makes of them (``targets.TargetRule.prepare``). A client's ``truth`` is there for an audit
    alone: it scores pseudo-labels and never trains anything.
    """

    name: str
    images: Tensor
    masks: Tensor | None = None
    confidences: Tensor | None = None
    probabilities: Tensor | None = None  # (N, K+1, S, S) uint8, of every class in 0..255
    truth: Tensor | None = None
    target: Tensor | None = None  # (N, K, S, S) uint8, 255 times the foreground's probabilities
    weight: Tensor | None = None  # (N, S, S) uint8, 255 times the pixels' weights

    def first(self, count: int) -> ClientData:
        """Return the first ``count`` images with all that is known of them."""
        return self.part(torch.arange(min(count, len(self.images))))

    def part(self, rows: Tensor) -> ClientData:
        """Return some of the images with all that is known of them."""
        parts: Any = {k: v[rows] for k, v in vars(self).items() if isinstance(v, Tensor)}
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
    target: Tensor | None = None  # (B, K+1, S, S) float32 distributions
    weight: Tensor | None = None  # (B, S, S) float32 in 0..1


@dataclass(frozen=True)
class Sampling:
    """How batches are drawn, one after another; both streams go on from batch to batch."""

    size: int  # images of a batch
    rows: np.random.Generator  # which images
    views: np.random.Generator  # how they look, so that settings of views move no image
    device: torch.device  # where batches are made and used
    augment: AugmentConfig

    @classmethod
    def labelled(cls, streams: Streams, config: Config, device: torch.device) -> Sampling:
        """Return how batches of D_p are drawn: alike, whatever the method."""
        rows, views = streams.rng("labelled rows"), streams.rng("labelled views")
        return cls(config.federate.labelled_batch, rows, views, device, config.augment)

    @classmethod
    def unlabelled(cls, streams: Streams, config: Config, device: torch.device) -> Sampling:
        """Return how batches of a client's own images are drawn."""
        rows, views = streams.rng("unlabelled rows"), streams.rng("unlabelled views")
        return cls(config.federate.unlabelled_batch, rows, views, device, config.augment)

    def choose(self, count: int) -> Tensor:
        """Draw rows (size,) of ``count``, without repetition where there are enough."""
        orders = [self.rows.permutation(count) for _ in range(-(-self.size // count))]
        return torch.from_numpy(np.concatenate(orders)[: self.size])

    def chosen(self, count: int, batches: int) -> Tensor:
        """Draw so many batches; return the rows of ``count`` that are in one of them, ascending."""
        rows: Tensor = torch.cat([self.choose(count) for _ in range(batches)]).unique()
        return rows


@dataclass(frozen=True)
class _View:
    """A batch under one random geometry."""

    images: Tensor  # (B, 3, S, S) float 0..1, of unchanged appearance
    grid: Tensor  # where its pixels come from
    grey: Tensor  # (B,) bool on the CPU
    sampling: Sampling

    @classmethod
    def draw(cls, images: Tensor, sampling: Sampling) -> _View:
        """Draw a view of ``images`` (B, 3, S, S) uint8."""
        pixels = images.to(sampling.device).float().div_(255)
        maps = random_affine(len(images), sampling.views, settings=sampling.augment)
        grid = sampling_grid(maps, pixels)
        return cls(warp_images(pixels, grid), grid, is_grey(images), sampling)

    def changed(self, limits: Photometry) -> Tensor:
        """Return the images with another appearance."""
        return change_appearance(self.images, limits, self.sampling.views, grey=self.grey)

    def strong(self) -> Tensor:
        """Return the images with an appearance that differs as much as the settings want."""
        return self.changed(STRONG.times(self.sampling.augment.intensity))

    def labels(self, values: Tensor) -> Tensor:
        """Return what belongs to the images (B, S, S) under the same geometry."""
        return warp_labels(values.to(self.sampling.device), self.grid)


def strong_copies(images: Tensor, rng: np.random.Generator, settings: AugmentConfig) -> Tensor:
    """Return images with strongly changed light and colour; geometry stays.

    Args and result: (B, 3, S, S) uint8 on the CPU.
    """
    limits = STRONG.times(settings.intensity)
    changed = change_appearance(images.float() / 255, limits, rng, grey=is_grey(images))
    return (changed * 255).round().to(torch.uint8)


def labelled_batch(public: PublicSet, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw an augmented labelled batch: images (B, 3, S, S) float 0..1, truth (B, S, S) int64."""
    chosen = sampling.choose(len(public.images))
    view = _View.draw(public.images[chosen], sampling)
    return view.strong(), view.labels(public.labels[chosen]).long()


def draw_views(client: ClientData, sampling: Sampling) -> Views:
    """Draw a weak and a strong view of some of the client's images."""
    chosen = sampling.choose(len(client.images))
    view = _View.draw(client.images[chosen], sampling)
    weak, strong = view.changed(LIGHT), view.strong()

    def warped(values: Tensor | None) -> Tensor | None:
        return None if values is None else view.labels(values[chosen])

    masks, confidences, truth = map(warped, (client.masks, client.confidences, client.truth))
    weight, target = warped(client.weight), None
    if client.target is not None:
        planes = client.target[chosen].unbind(dim=1)
        foreground = torch.stack([view.labels(plane) for plane in planes], dim=1).float() / 255
        background = (1 - foreground.sum(dim=1, keepdim=True)).clamp(min=0)
        target = torch.cat([background, foreground], dim=1)
    return Views(
        weak=weak,
        strong=strong,
        masks=None if masks is None else masks.long(),
        confidences=None if confidences is None else confidences.float() / 255,
        truth=None if truth is None else truth.long(),
        target=target,
        weight=None if weight is None else weight.float() / 255,
    )
