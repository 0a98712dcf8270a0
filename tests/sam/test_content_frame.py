"""A content frame equals SAM's square in which attention masks the padding, and is used alike."""

from __future__ import annotations

import copy
from functools import partial

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import Attention, add_decomposed_rel_pos
from segment_anything.modeling.transformer import Attention as DecoderAttention
from teachers import make_card
from torch import Tensor, nn

from pipeline.sam.attention import ImageEncoder, fold_attention
from pipeline.sam.build import build_sam
from pipeline.sam.frame import frame_hw, inside_image, to_input_frame
from pipeline.sam.teacher import Teacher, forward
from pipeline.sam.training import upright_grid
from pipeline.segmentation.augmentation import warp_images

SIDE = 256  # px: 16 x 16 tokens, which windows of 5 do not divide


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return noise in large squares, which resizing leaves."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


class MaskedAttention(nn.Module):
    """segment-anything's attention in a global block, its keys masked outside (N, N) ``inside``."""

    def __init__(self, stock: Attention, inside: Tensor) -> None:
        super().__init__()
        self.stock, self.inside = stock, inside

    def forward(self, x: Tensor) -> Tensor:
        stock, (batch, height, width, _) = self.stock, x.shape
        qkv = stock.qkv(x).reshape(batch, height * width, 3, stock.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, -1, height * width, qkv.shape[-1])
        logits = (q * stock.scale) @ k.transpose(-2, -1)
        tables = stock.rel_pos_h, stock.rel_pos_w
        logits = add_decomposed_rel_pos(logits, q, *tables, (height, width), (height, width))
        logits = logits.masked_fill(~self.inside.flatten(), -torch.inf)
        out = (logits.softmax(dim=-1) @ v).view(batch, stock.num_heads, height, width, -1)
        projected: Tensor = stock.proj(out.permute(0, 2, 3, 1, 4).reshape(x.shape))
        return projected


class MaskedDecoderAttention(nn.Module):
    """The decoder's attention from its tokens to the image, keys masked outside."""

    def __init__(self, stock: DecoderAttention, inside: Tensor) -> None:
        super().__init__()
        self.stock, self.inside = stock, inside

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stock = self.stock
        projected = stock.q_proj(q), stock.k_proj(k), stock.v_proj(v)
        q, k, v = (stock._separate_heads(part, stock.num_heads) for part in projected)
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        logits = logits.masked_fill(~self.inside.flatten(), -torch.inf)
        out: Tensor = stock.out_proj(stock._recombine_heads(logits.softmax(dim=-1) @ v))
        return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def stir(module: nn.Module) -> None:
    """Give weights values so large that attention has somewhere to look."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def small_sam() -> Sam:
    """A SAM with windows that do not divide its square, and relative positions that count."""
    sam = build_sam("vit_t")
    sam.image_encoder = ImageEncoder(
        img_size=SIDE,
        patch_size=16,
        embed_dim=64,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        out_chans=64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=(1, 3),
        window_size=5,
    )
    stir(sam)
    return sam.eval().requires_grad_(False)


def masked(sam: Sam, inside: Tensor) -> Sam:
    """segment-anything's own modules on the square, with the padding masked everywhere."""

    def silence(module: nn.Module, given: object, out: Tensor) -> Tensor:
        return out * (inside[..., None] if out.shape[-1] != len(inside) else inside)

    sam = copy.deepcopy(sam)
    for block in sam.image_encoder.blocks:
        if block.window_size:
            block.norm1.register_forward_hook(silence)
        else:
            block.attn = MaskedAttention(block.attn, inside)
    sam.image_encoder.neck[1].register_forward_hook(silence)
    transformer = sam.mask_decoder.transformer
    for layer in transformer.layers:
        layer.cross_attn_token_to_image = MaskedDecoderAttention(
            layer.cross_attn_token_to_image, inside
        )
    transformer.final_attn_token_to_image = MaskedDecoderAttention(
        transformer.final_attn_token_to_image, inside
    )
    return sam


@torch.inference_mode()
@pytest.mark.parametrize("size_hw", [(192, 256), (256, 150)], ids=["4:3", "portrait"])
def test_a_content_frame_equals_attention_that_masks_the_padding(size_hw: tuple[int, int]) -> None:
    sam = small_sam()
    pixels, valid_hw = to_input_frame([picture(*size_hw), picture(*size_hw, 1)], SIDE, 16)
    square, _ = to_input_frame([picture(*size_hw), picture(*size_hw, 1)], SIDE)
    rows, cols = (side // 16 for side in pixels.shape[-2:])
    assert (rows, cols) == tuple(-(-side // 16) for side in size_hw)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:rows, :cols] = True
    padded = square, inside_image(valid_hw, square.shape[-2:])
    expected, expected_iou = forward(masked(sam, inside), *padded)
    expected = expected[..., : 4 * rows, : 4 * cols]
    plain = forward(sam, *padded)[0][..., : 4 * rows, : 4 * cols]
    fold_attention(sam.image_encoder)
    found, iou = forward(sam, pixels, inside_image(valid_hw, pixels.shape[-2:]))
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-4
    assert relative_error(iou, expected_iou) < 1e-4
    assert relative_error(plain, expected) > 1e-2  # the padding does count where it is not masked


@torch.inference_mode()
def test_slices_of_a_content_frame_equal_the_fused_kernel() -> None:
    attention = fold_attention(_one_block()).blocks[0].attn
    x = torch.randn(1, 20, 33, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for slices in (True, False):
        attention.slices = slices
        found.append(attention(x))
    assert relative_error(*found) < 1e-5


def _one_block() -> ImageEncoder:
    encoder = ImageEncoder(
        img_size=1024, embed_dim=16, depth=1, num_heads=2, out_chans=4, use_rel_pos=True
    )
    stir(encoder)
    return encoder.eval()


@pytest.mark.parametrize(
    ("image_hw", "patch", "expected"),
    [
        ((768, 1024), None, (1024, 1024)),
        ((768, 1024), 16, (768, 1024)),
        ((1024, 683), 16, (1024, 688)),
        ((1024, 683), 32, (1024, 704)),
        ((1, 1024), 16, (16, 1024)),
    ],
)
def test_sides_are_rounded_up_to_whole_patches(
    image_hw: tuple[int, int], patch: int | None, expected: tuple[int, int]
) -> None:
    assert frame_hw(image_hw, 1024, patch) == expected


@pytest.mark.parametrize(
    ("variant", "side"),
    [("vit_t", 256), ("mobile_sam", 128), ("timm:mobilenetv3_small_050", 128)],
)
def test_images_of_one_shape_share_a_pass_in_their_own_frame(variant: str, side: int) -> None:
    sam = build_sam(variant, input_size=side)
    stir(sam)
    card = make_card(variant=variant, input_size=side, frame="content")
    teacher = Teacher(sam, card, device="cpu", precision="fp32")
    shapes: list[torch.Size] = []
    sam.image_encoder.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    images = [picture(96, 128), picture(128, 96, 1), picture(90, 120, 2), picture(80, 80, 3)]
    together, scores = teacher.probabilities(images, (16, 16))
    short = side * 3 // 4
    assert [tuple(shape[-2:]) for shape in shapes] == [(short, side), (side, short), (side, side)]
    assert [shape[0] for shape in shapes] == [2, 1, 1]
    for row, image in enumerate(images):
        alone, score = teacher.probabilities([image], (16, 16))
        gaps = (together - alone).abs().amax(dim=(1, 2, 3))
        assert float(gaps[row]) < 1e-3
        assert int((gaps > 1e-2).sum()) == 3  # it is no other image's
        assert torch.allclose(scores[row], score[0], atol=1e-3)


def test_a_view_keeps_angles_and_lies_on_its_side_after_a_quarter_turn() -> None:
    image = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(4))
    upright = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    turned = torch.tensor([[0.0, 1, 0], [-1, 0, 0]])
    same = warp_images(image, upright_grid(upright, (6, 10), (6, 10)))
    aside = warp_images(image, upright_grid(turned, (6, 10), (10, 6)))
    assert torch.allclose(same, image, atol=1e-5)
    assert torch.allclose(aside, image.rot90(-1, (2, 3)), atol=1e-5)
