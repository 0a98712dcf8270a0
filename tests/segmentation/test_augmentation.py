"""Random views: which orientations settings allow, and what grey images keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import AugmentConfig
from pipeline.segmentation.augmentation import (
    HEAVY,
    STRONG,
    change_appearance,
    random_affine,
    sampling_grid,
    warp_labels,
)

CORNERS = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)  # no two orientations look alike
ROTATIONS = {(1, 2, 3, 4), (2, 4, 1, 3), (4, 3, 2, 1), (3, 1, 4, 2)}
EVERY = ROTATIONS | {(2, 1, 4, 3), (1, 3, 2, 4), (3, 4, 1, 2), (4, 2, 3, 1)}


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
    maps = random_affine(200, torch.Generator().manual_seed(0), settings=settings)
    corners = CORNERS.expand(200, 2, 2)
    seen = warp_labels(corners, sampling_grid(maps, corners)).flatten(start_dim=1).tolist()
    assert {tuple(each) for each in seen} == expected


def test_what_is_left_out_moves_no_other_draw() -> None:
    still = AugmentConfig(flips="none", turns=False, rotation=0, scale=0)
    both = [
        random_affine(5, torch.Generator().manual_seed(1), settings=settings)
        for settings in (AugmentConfig(), still)
    ]
    assert torch.equal(both[0][:, :, 2], both[1][:, :, 2])
    assert torch.equal(both[1][:, :, :2], torch.eye(2).expand(5, 2, 2))


def test_a_grey_image_stays_grey_beside_colour() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(2)) * 0.2 + 0.4
    images[::2] = images[::2, :1]
    for seed in range(5):  # some of them blur
        changed = change_appearance(images, HEAVY, torch.Generator().manual_seed(seed))
        spread = changed.amax(dim=1) - changed.amin(dim=1)
        assert float(spread[::2].max()) < 1e-6
        assert bool((spread[1::2].flatten(start_dim=1).amax(dim=1) > 0.1).all())
        moved = (changed - images).abs().flatten(start_dim=1).mean(dim=1)
        assert bool((moved > 0.005).all())


def test_intensity_is_a_factor_of_the_limits() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4
    assert STRONG.times(1.0) == STRONG
    assert STRONG.times(10.0).blur_probability == 1
    none = change_appearance(images, STRONG.times(0.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(none, images)
    moved = [
        float((change_appearance(images, limits, torch.Generator().manual_seed(0)) - images).std())
        for limits in (STRONG.times(0.5), STRONG)
    ]
    assert moved[0] < 0.75 * moved[1]
