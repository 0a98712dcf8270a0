"""How unlike an image is, and what a client may say of its images."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import Config
from pipeline.errors import NotFiniteError
from pipeline.segmentation.likeness import (
    Moments,
    distances,
    logits_and_features,
    moments,
    pooled_features,
    statistics,
    threshold_of,
    usual_distance,
)
from pipeline.segmentation.networks import build_model, normalise


def draw(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Return correlated features (count, 3)."""
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    mixed = torch.tensor([[2.0, 0.0, 0.0], [1.9, 0.3, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    return values @ mixed.T + shift


def test_sums_over_clients_are_the_sums_over_all_images() -> None:
    features = draw(60, 0)
    parts = [moments(part) for part in features.split([10, 20, 30])]
    split, whole = statistics(parts), statistics([moments(features)])
    assert split.images == 60
    torch.testing.assert_close(split.mean, features.mean(dim=0))
    torch.testing.assert_close(split.whitening, whole.whitening)


def test_distances_are_about_one_and_see_what_breaks_a_correlation() -> None:
    given = statistics([moments(draw(500, 1))])
    usual = distances(draw(500, 2), given.mean, given.whitening)
    assert 0.5 < usual.square().mean() < 1.2  # shrinking correlations makes it smaller than 1
    # each feature by itself is within its usual range, both together are not
    pair = torch.tensor([[2.0, -2.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    strange, common = distances(pair, given.mean, given.whitening)
    assert strange > usual_distance(draw(500, 3), given) > common
    kept = given.with_threshold(1.5)
    stored = (torch.tensor(v, dtype=torch.float64) for v in (kept.mean, kept.whitening))
    again = distances(draw(9, 4), *stored)
    torch.testing.assert_close(
        again, distances(draw(9, 4), given.mean, given.whitening), rtol=1e-4, atol=1e-4
    )


def test_sums_that_no_images_have_are_refused() -> None:
    own = moments(draw(20, 5))
    values = own.as_tensor()
    assert Moments.received(20, values, like=own) is not None
    assert Moments.received(20, None, like=own) is None
    assert Moments.received(20, values[:2], like=own) is None
    assert Moments.received(20, values * torch.nan, like=own) is None
    crooked, negative = values.clone(), values.clone()
    crooked[1, 2] += 1
    negative[1:] -= 1e4 * torch.eye(3)
    assert Moments.received(20, crooked, like=own) is None
    assert Moments.received(20, negative, like=own) is None
    assert Moments.received(20, values.to(torch.int64), like=own) is None


def test_sums_that_would_break_those_of_all_are_refused() -> None:
    """The hugest number is no cover for features that cannot go together, nor for an overflow."""
    own = moments(draw(20, 5))
    pairs = [[0.0, 0.0, 0.0], [1e70, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, 5.0, 1.0]]
    hidden = 20 * torch.tensor(pairs, dtype=torch.float64)
    far, large = hidden.clone(), 1e308 * torch.eye(3, dtype=torch.float64)
    far[0] = 1e200
    for values in (hidden, far, torch.cat([torch.zeros(1, 3), large])):
        assert Moments.received(20, values, like=own) is None
    flat = moments(torch.full((20, 3), 7.1, dtype=torch.float64))  # a network may see no difference
    found = Moments.received(20, flat.as_tensor(), like=own)
    assert found is not None
    assert statistics([own, found]).whitening.isfinite().all()


@pytest.mark.parametrize("scale", [1e10, 1e200], ids=["beyond what sums can tell", "infinite"])
def test_features_of_a_ruined_model_end_in_one_line(scale: float) -> None:
    """As where hostile updates have wrecked the weights."""
    with pytest.raises(NotFiniteError, match=r"training has broken down.*federate\.aggregation"):
        statistics([moments(scale + draw(20, 0))])


def test_no_client_widens_the_threshold_at_will() -> None:
    assert threshold_of([1.0, 1.2, 1.5]) == 1.5
    assert threshold_of([1.0, 1.2, 50.0]) == pytest.approx(3.6)


@pytest.mark.parametrize("architecture", ["fpn", "deeplabv3plus"])
def test_logits_are_the_networks_own(architecture: str) -> None:
    config = Config.model_validate(
        {
            "data": {"image_size": 32},
            "model": {"architecture": architecture, "encoder_depth": 5},
        }
    )
    model = build_model(config, seed=0).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        inputs = normalise(images.float() / 255)
        logits, features = logits_and_features(model, inputs)
        assert torch.equal(logits, model(inputs))
    torch.testing.assert_close(features.double(), pooled_features(model, images))
