"""How far a model keeps its labels under other light, at home and at a site."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import Calibration
from pipeline.federation.targets import (
    calibration_at_site,
    measure_calibration,
    measure_consistency,
)
from pipeline.federation.views import ClientData, PublicSet


class BrightIsForeground(nn.Module):
    """Calls foreground what is brighter than a limit (of normalised images)."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        bright = 20 * (images.mean(dim=1) - self.limit)
        return torch.stack([-bright, bright], dim=1)


def scenes(dark: int, bright: int, count: int = 12) -> Tensor:
    """Return dark images (N, 3, 32, 32) uint8, each with a bright square."""
    images = torch.full((count, 3, 32, 32), dark, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = bright
    return images


def settings(**sections: Any) -> Config:
    return Config.model_validate({"data": {"image_size": 32}, **sections})


def test_a_model_whose_labels_hang_on_the_light_is_inconsistent() -> None:
    """Normalised grey is near 0: beside it labels change with the light, far from it they stay."""
    model, config = BrightIsForeground(), settings()
    far = measure_consistency(model, scenes(20, 230), config)
    near = measure_consistency(model, scenes(105, 125), config)
    assert near < 0.8 < 0.95 < far <= 1
    assert near == measure_consistency(model, scenes(105, 125), config), "the same views again"
    still = settings(augment={"intensity": 0})
    assert measure_consistency(model, scenes(105, 125), still) == 1


def test_many_images_are_asked_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 images 50, from the first to one of the last."""
    asked = []
    real = BrightIsForeground.forward

    def record(self: BrightIsForeground, images: Tensor) -> Tensor:
        asked.append(len(images))
        return real(self, images)

    monkeypatch.setattr(BrightIsForeground, "forward", record)
    images = scenes(105, 125, count=200)
    images[100:] = scenes(20, 230, count=100)
    half = measure_consistency(BrightIsForeground(), images, settings())
    assert sum(asked) == 2 * 50
    near, far = (
        measure_consistency(BrightIsForeground(), part[::4], settings())
        for part in (images[:100], images[100:])
    )
    assert near + 0.05 < half < far - 0.05


def test_an_image_has_the_same_view_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = BrightIsForeground.forward

    def record(self: BrightIsForeground, images: Tensor) -> Tensor:
        seen.append(images)
        return real(self, images)

    monkeypatch.setattr(BrightIsForeground, "forward", record)
    images = scenes(105, 125, count=11)
    for count in (10, 11):
        measure_consistency(BrightIsForeground(), images[:count], settings())
    (_, ten, _, eleven) = seen
    assert torch.equal(ten, eleven[:10])


def test_a_model_is_believed_less_where_it_wavers_more_than_at_home() -> None:
    model = BrightIsForeground()
    home = ClientData(
        "server",
        scenes(20, 230),
        masks=torch.zeros(12, 32, 32, dtype=torch.uint8),
        confidences=torch.full((12, 32, 32), 250, dtype=torch.uint8),
        truth=(scenes(20, 230)[:, 0] > 100).to(torch.uint8),
    )
    public = PublicSet(home.images, home.truth, home, tuple(str(row // 2) for row in range(12)))
    config = settings(federate={"method": "sam_fed"})
    found = measure_calibration(model, public, config)
    assert found.client_consistency is not None
    assert found.client_consistency > 0.95
    assert found.groups == 6  # of two images each
    away = calibration_at_site(model, scenes(105, 125), found, config)
    assert away == replace(found, client_kept=away.client_kept)
    assert away.client_kept < 0.7
    assert calibration_at_site(model, home.images, found, config).client_kept == 1
    assert away.numbers()["client_kept"] == away.client_kept
    # SAM alone asks nothing of the model
    alone = measure_calibration(model, public, settings(federate={"method": "sam_soft"}))
    assert alone.client_consistency is None
    assert calibration_at_site(model, scenes(105, 125), alone, config) == alone


@pytest.mark.parametrize(
    ("groups", "consistency", "kept"),
    [
        (2, 0.5, 0.5 / 0.7),  # home is taken for (2 x 0.9 + 2 x 0.5) / 4
        (18, 0.5, 0.5 / 0.86),
        (18, 0.95, 1.0),
        (1, 0.0, 0.05),  # the odds stay finite
    ],
)
def test_what_is_kept_at_a_site_by_hand(groups: int, consistency: float, kept: float) -> None:
    found = Calibration(client_consistency=0.9, groups=groups).at_site(consistency)
    assert found.client_kept == pytest.approx(kept**2)
