"""8-bit linear layers: oneDNN's products are exact, and scales are each token's own.

A CPU without VNNI adds pairs of products in 16 bits, where they overflow. Here every second column
of a weight is zero, so that no pair does, and these tests hold on any CPU.
"""

from __future__ import annotations

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import pytest
import torch
from segment_anything.modeling.common import MLPBlock
from torch import nn

from pipeline.errors import ConfigError
from pipeline.sam.build import build_sam
from pipeline.sam.int8 import Int8Linear, Int8Mlp, quantise
from pipeline.sam.teacher import resolve_precision


def linear(inside: int, outside: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inside, outside, bias=bias)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer.weight.data[:, 1::2] = 0
    return layer


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_whole_numbers_are_exact(bias: bool) -> None:
    """Tokens of 256 values in a row, wherever these begin, and some of one value alone."""
    layer = linear(64, 24, bias=bias)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (300, 64), generator=generator).float()
    tokens[:, 0], tokens[:, 1] = 0, 255  # each scale is 1
    tokens -= torch.randint(0, 300, (300, 1), generator=generator)
    tokens[7], tokens[8] = 0, 3
    layer.weight.data.mul_(40).round_().clamp_(-127, 127)[:, 2] = -127
    found = Int8Linear(layer, dtype=torch.float32)(tokens.view(3, 10, 10, 64))
    assert torch.allclose(found, layer(tokens).view(3, 10, 10, 24), rtol=1e-5, atol=0.05)


@torch.no_grad()
def test_a_token_does_not_depend_on_others_and_is_near() -> None:
    layer, x = linear(768, 96), torch.randn(2, 300, 768, generator=torch.Generator().manual_seed(2))
    x[1] *= 1000  # one scale for all would round the first image to nothing
    quantised = Int8Linear(layer, dtype=torch.float32)
    found = quantised(x)
    assert torch.equal(found[:1], quantised(x[:1]))
    for image, exact in zip(found, layer(x), strict=True):
        assert (image - exact).norm() < 0.015 * exact.norm()


@torch.no_grad()
def test_two_layers_with_an_activation_between_them() -> None:
    block = MLPBlock(64, 128)
    block.lin1, block.lin2 = linear(64, 128), linear(128, 64)
    x = torch.randn(2, 13, 14, 64, generator=torch.Generator().manual_seed(3))
    found = Int8Mlp(block, dtype=torch.bfloat16)(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, x.shape)
    assert (found.float() - block(x)).norm() < 0.02 * block(x).norm()


@torch.no_grad()
def test_an_encoder_without_float_layers() -> None:
    encoder = build_sam("vit_t").image_encoder.eval()
    layers = sum(isinstance(module, nn.Linear) for module in encoder.modules())
    quantise(encoder, dtype=torch.float32)
    assert not any(isinstance(module, nn.Linear) for module in encoder.modules())
    assert sum(isinstance(module, Int8Linear) for module in encoder.modules()) == layers
    assert encoder(torch.zeros(1, 3, 256, 256)).shape == (1, 64, 16, 16)


def test_a_backbone_that_multiplies_weights_itself_is_refused() -> None:
    layer = Int8Linear(nn.Linear(8, 4), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"precompute\.precision: int8 .* use auto, bf16 or fp32"):
        nn.functional.linear(torch.zeros(1, 8), layer.weight)


def test_an_encoder_without_linear_layers_is_refused() -> None:
    encoder = build_sam("timm:mobilenetv3_small_050", input_size=64).image_encoder
    with pytest.raises(ConfigError, match=r"int8 is for linear layers, .* use auto, bf16 or fp32"):
        quantise(encoder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_a_cpu_that_has_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert resolve_precision("int8", torch.device("cpu"), "vit_b") == "int8"


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    with pytest.raises(ConfigError, match=r"int8 needs a CPU with VNNI .* lacks; use auto"):
        resolve_precision("int8", torch.device("cpu"), "vit_b")
    with pytest.raises(ConfigError, match=r"int8 is for CPUs; use auto, bf16 or fp16 on a GPU"):
        resolve_precision("int8", torch.device("cuda"), "vit_b")
