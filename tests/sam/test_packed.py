"""Linear layers in bfloat16 through oneDNN's own layout: as near to the exact result as torch's."""

from __future__ import annotations

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import pytest
import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from pipeline.sam.build import build_sam
from pipeline.sam.packed import PackedLinear, PackedMlp, pack

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU with AVX512"
)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40, bias=bias), torch.randn(2, 7, 5, 96)
    found = PackedLinear(layer)(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 7, 5, 40))
    assert error(found, layer(x)) < 5e-3


@torch.no_grad()
def test_two_layers_with_an_activation_between_them() -> None:
    torch.manual_seed(0)
    block, x = MLPBlock(64, 128), torch.randn(2, 5, 4, 64)
    exact, found = block(x), PackedMlp(block)(x)
    plain = block.bfloat16()(x.bfloat16())
    assert found.shape == x.shape
    assert error(found, exact) < 1.1 * error(plain, exact)


@torch.no_grad()
def test_another_activation_stays() -> None:
    torch.manual_seed(0)
    block, x = MLPBlock(64, 128, act=nn.ReLU), torch.randn(3, 64)
    exact, parent = block(x), nn.ModuleList([block])
    pack(parent)
    assert isinstance(block.lin1, PackedLinear)
    assert error(block(x), exact) < 1e-2


@torch.no_grad()
def test_an_encoder() -> None:
    torch.manual_seed(0)
    encoder, x = build_sam("vit_t").image_encoder.eval(), torch.randn(1, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        plain = encoder(x)
    exact = encoder(x)
    pack(encoder)
    assert not any(isinstance(module, nn.Linear) for module in encoder.modules())
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(x)
    assert error(found, exact) < 1.2 * error(plain.float(), exact)


@torch.no_grad()
def test_a_block_that_multiplies_the_weights_itself() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40), torch.randn(7, 96)
    packed = PackedLinear(layer)
    found = nn.functional.linear(x.bfloat16(), packed.weight, packed.bias)
    assert torch.equal(packed.weight, layer.weight.bfloat16())
    assert error(found, layer(x)) < 5e-3


def test_each_layer_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[nn.Linear] = []
    init = PackedLinear.__init__

    def counting(self: PackedLinear, linear: nn.Linear, *, gelu: bool = False) -> None:
        packed.append(linear)
        init(self, linear, gelu=gelu)

    monkeypatch.setattr(PackedLinear, "__init__", counting)
    encoder = build_sam("vit_t").image_encoder
    linear = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    pack(encoder)
    assert len(packed) == len(linear)
