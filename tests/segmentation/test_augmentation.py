"""Random views: which orientations settings allow, and what grey images keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import AugmentConfig
from pipeline.segmentation.augmentation import (
    HEAVY,
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
from pipeline.segmentation.losses import IGNORE

CORNERS = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)  # no two orientations look alike
ROTATIONS = {(1, 2, 3, 4), (2, 4, 1, 3), (4, 3, 2, 1), (3, 1, 4, 2)}
EVERY = ROTATIONS | {(2, 1, 4, 3), (1, 3, 2, 4), (3, 4, 1, 2), (4, 2, 3, 1)}


def changed(images: Tensor, limits: Photometry, *, seed: int = 0) -> Tensor:
    return change_appearance(images, limits, np.random.default_rng(seed), grey=is_grey(images))


@pytest.mark.parametrize(
    ("flips", "turns", "expected"),
    [
        ("none", False, {(1, 2, 3, 4)}),
        ("horizontal", False, {(1, 2, 3, 4), (2, 1, 4, 3)}),
        ("both", False, {(1, 2, 3, 4), (2, 1, 4, 3), (3, 4, 1, 2), (4, 3, 2, 1)}),
        ("none", True, ROTATIONS),
        ("horizontal", True, EVERY),
        ("both", True, EVERY),
    ],
)
def test_the_orientations_that_settings_allow(
    flips: Any, turns: bool, expected: set[tuple[int, ...]]
) -> None:
    settings = AugmentConfig(flips=flips, turns=turns, rotation=0, scale=0, shift=0)
    maps = random_affine(200, np.random.default_rng(0), settings=settings)
    corners = CORNERS.expand(200, 2, 2)
    seen = warp_labels(corners, sampling_grid(maps, corners)).flatten(start_dim=1).tolist()
    assert {tuple(each) for each in seen} == expected


def test_what_is_left_out_moves_no_other_draw() -> None:
    still = AugmentConfig(flips="none", turns=False, rotation=0, scale=0)
    both = [
        random_affine(5, np.random.default_rng(1), settings=settings)
        for settings in (AugmentConfig(), still)
    ]
    assert torch.equal(both[0][:, :, 2], both[1][:, :, 2])
    assert torch.equal(both[1][:, :, :2], torch.eye(2).expand(5, 2, 2))


def test_a_grey_image_stays_grey_beside_colour() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(2)) * 0.2 + 0.4
    images[::2] = images[::2, :1]
    for seed in range(5):  # some of them blur
        out = changed(images, HEAVY, seed=seed)
        spread = out.amax(dim=1) - out.amin(dim=1)
        assert float(spread[::2].max()) == 0
        assert bool((spread[1::2].flatten(start_dim=1).amax(dim=1) > 0.1).all())
        moved = (out - images).abs().flatten(start_dim=1).mean(dim=1)
        assert bool((moved > 0.005).all())


def test_intensity_is_a_factor_of_the_limits() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4
    assert STRONG.times(1.0) == STRONG
    assert STRONG.times(10.0).blur_probability == 1
    none = changed(images, STRONG.times(0.0))
    torch.testing.assert_close(none, images)
    moved = [
        float((changed(images, limits) - images).std()) for limits in (STRONG.times(0.5), STRONG)
    ]
    assert moved[0] < 0.75 * moved[1]


def test_geometry_is_shared() -> None:
    """An image warped with its own mask as a channel stays aligned with the warped mask."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centres = torch.arange(8, 24)[:, None, None]
    masks = ((rows - centres) ** 2 + (columns - 16) ** 2 < 50).to(torch.uint8)
    maps = random_affine(16, np.random.default_rng(4), settings=AugmentConfig())
    grid = sampling_grid(maps, masks)
    warped = warp_images(masks[:, None].float().expand(-1, 3, -1, -1), grid)
    labels = warp_labels(masks, grid)
    assert labels.dtype == torch.uint8
    sure = (warped[:, 0] < 0.01) | (warped[:, 0] > 0.99)  # away from interpolated edges
    assert float(sure.float().mean()) > 0.8
    assert torch.equal((warped[:, 0] > 0.5)[sure], (labels == 1)[sure])


def test_padding_can_be_ignored() -> None:
    maps = torch.tensor([[[1.0, 0, 1.0], [0, 1, 0]]])  # half an image to the right
    ones = torch.ones(1, 8, 8, dtype=torch.uint8)
    labels = warp_labels(ones, sampling_grid(maps, ones), padding="zeros", fill=IGNORE)
    assert labels[0, 0].tolist() == [1, 1, 1, 1, IGNORE, IGNORE, IGNORE, IGNORE]


def test_appearance_stays_in_range_and_differs_by_image() -> None:
    images = torch.full((4, 3, 16, 16), 0.5)
    strong = changed(images, STRONG)
    assert float(strong.min()) >= 0
    assert float(strong.max()) <= 1
    means = strong.mean(dim=(1, 2, 3))
    assert len(set(means.tolist())) == 4
    light = changed(images, LIGHT)
    assert float((light - images).abs().mean()) < float((strong - images).abs().mean())


def test_the_grid_is_torchs() -> None:
    maps = random_affine(3, np.random.default_rng(0), settings=AugmentConfig())
    grid = sampling_grid(maps, torch.zeros(3, 1, 20, 32))
    expected = F.affine_grid(maps, [3, 1, 20, 32], align_corners=False)
    torch.testing.assert_close(grid, expected, rtol=0, atol=1e-6)


def test_colour_by_hand() -> None:
    """With c 1.5, b 0.1, s 0.5 and no cast; the luma of the only pixel is 0.413, its mean 0.4."""
    images = torch.tensor([0.2, 0.5, 0.5])[None, :, None, None]
    luma, mean = 0.299 * 0.2 + 0.701 * 0.5, 0.4
    grey = 1.5 * (luma - mean) + mean + 0.1
    lit = [1.5 * (value - mean) + mean + 0.1 for value in (0.2, 0.5, 0.5)]
    expected = [grey + 0.5 * (value - grey) for value in lit]

    class Fixed:
        """Draws that are known: contrast, brightness, saturation, cast, then no blur."""

        drawn = iter((0.5, 0.1, -0.5, 0.0))

        def uniform(self, low: float, high: float, shape: tuple[int, int]) -> np.ndarray:
            return np.full(shape, next(self.drawn))

        def random(self) -> float:
            return 1.0

    limits = Photometry(1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    found = change_appearance(images, limits, Fixed(), grey=is_grey(images))  # type: ignore[arg-type]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_blur_keeps_what_is_flat_and_spreads_a_point_evenly() -> None:
    """Sigma is 0.3 to 1.3, so a point keeps more than it gives, and its sum."""
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 8, 8] = 0.5
    out = changed(images, Photometry(0.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    assert out.sum().item() == pytest.approx(1.5, rel=1e-5)
    assert bool((out[0, 0, 8, 8] > out[0, 0, 8, 9]) & (out[0, 0, 8, 9] > out[0, 0, 8, 10]))
    for turned in (out.flip(2).roll(1, 2), out.flip(3).roll(1, 3), out.transpose(2, 3)):
        torch.testing.assert_close(turned, out)
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(changed(flat, Photometry(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)), flat)
