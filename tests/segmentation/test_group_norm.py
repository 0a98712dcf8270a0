"""Networks whose batch norm layers became group norm: no image in a batch changes another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import Config
from pipeline.params import parse_config
from pipeline.segmentation.networks import GroupNorm, build_model


def settings(normalisation: str, **model: Any) -> Config:
    raw = {"data": {"image_size": 64}, "model": {"normalisation": normalisation, **model}}
    return parse_config(raw, source="test")


@pytest.mark.parametrize(
    "network",
    [
        {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},  # activations within batch norm
        {"architecture": "deeplabv3plus", "encoder": "resnet18", "encoder_depth": 5},
        {"architecture": "linknet", "encoder": "tu-regnetx_002", "encoder_depth": 5},
    ],
    ids=lambda network: str(network.get("architecture")),
)
def test_an_image_is_normalised_by_itself(network: dict[str, Any]) -> None:
    batch, group = (build_model(settings(n, **network), seed=0) for n in ("batch", "group"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in group.modules())
    assert dict(group.named_buffers()) == {}
    names = [name for name, _ in batch.named_parameters()]
    assert [name for name, _ in group.named_parameters()] == names
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    for module in group.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.allclose(group(images)[:1], group(images[:1]), atol=1e-4)
    assert not torch.allclose(group(images), batch.eval()(images), atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(3, 1), (6, 1), (8, 2), (16, 4), (24, 4), (40, 8), (256, 32), (960, 32)],
)
def test_groups_have_four_channels_or_more(channels: int, groups: int) -> None:
    norm = nn.BatchNorm2d(channels, eps=0.5)
    nn.init.normal_(norm.weight)
    found = GroupNorm(norm)
    assert (found.num_groups, found.eps) == (groups, 0.5)
    images = torch.randn(2, channels, 3, 3)
    expected = nn.functional.group_norm(images, groups, norm.weight, norm.bias, 0.5)
    assert torch.equal(found(images), expected)
