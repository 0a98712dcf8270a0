"""The teacher: equal to segment-anything where it must be, and its frames where they matter."""

from __future__ import annotations

import copy

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn

from pipeline.config import SamConfig
from pipeline.errors import ConfigError
from pipeline.sam.attention import FoldedAttention, fold_attention
from pipeline.sam.build import build_sam, decode_masks
from pipeline.sam.checkpoints import build_base
from pipeline.sam.frame import inside_image, to_client_frame, to_input_frame
from pipeline.sam.lora import add_adapter, merge_lora
from pipeline.sam.teacher import forward, image_score, resolve_precision, to_labels
from pipeline.sam.training import real_iou
from pipeline.segmentation.losses import IGNORE
from pipeline.segmentation.reliability import Reliability


def randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter a value: segment-anything starts relative positions at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def stock_encoder(variant: str) -> nn.Module:
    """The variant's encoder with segment-anything's own attention, random weights."""
    encoder = build_sam(variant).image_encoder
    for block in encoder.blocks:
        folded = block.attn
        stock = Attention(folded.qkv.in_features, folded.num_heads, use_rel_pos=False)
        stock.use_rel_pos = True
        stock.qkv, stock.proj = folded.qkv, folded.proj
        stock.rel_pos_h, stock.rel_pos_w = folded.rel_pos_h, folded.rel_pos_w
        block.attn, block.window_size = stock, folded.window_size
    randomise(encoder, 0)
    return encoder.eval()


@torch.no_grad()
def test_vit_t_equals_segment_anything() -> None:
    stock = stock_encoder("vit_t")
    folded = fold_attention(copy.deepcopy(stock))
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    assert any(isinstance(block.attn, FoldedAttention) for block in folded.blocks)
    assert list(folded.state_dict()) == list(stock.state_dict())
    assert relative_error(folded(images), stock(images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "grid"),
    [(14, (20, 20)), (0, (20, 20)), (0, (33, 34))],
    ids=["window", "global", "slices"],
)
def test_a_vit_b_block_equals_segment_anything(window: int, grid: tuple[int, int]) -> None:
    """The official width and heads on grids that windows and slices do not divide."""
    stock = Block(768, 12, use_rel_pos=True, window_size=window, input_size=grid)
    randomise(stock, 2)
    folded = copy.deepcopy(stock)
    folded.attn, folded.window_size = FoldedAttention(folded.attn, window_size=window), 0
    x = torch.randn(1, *grid, 768, generator=torch.Generator().manual_seed(3))
    assert relative_error(folded(x), stock(x)) < 1e-5


def test_slices_in_bfloat16_are_as_close_as_segment_anything() -> None:
    stock = Attention(768, 12, use_rel_pos=True, input_size=(33, 34))
    randomise(stock, 4)
    x = torch.randn(1, 33, 34, 768, generator=torch.Generator().manual_seed(5))
    folded = FoldedAttention(stock)
    with torch.no_grad():
        exact = stock(x)
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = stock(x).float(), folded(x).float()
    assert relative_error(ours, exact) < 1.2 * relative_error(theirs, exact)
    graph = folded(x)  # with a gradient wanted, the same function from the fused kernel
    assert graph.requires_grad
    assert relative_error(graph.detach(), exact) < 1e-5


@torch.no_grad()
def test_relative_positions_of_a_non_square_grid() -> None:
    stock = Attention(64, 4, use_rel_pos=True, input_size=(6, 10))
    randomise(stock, 4)
    x = torch.randn(2, 6, 10, 64, generator=torch.Generator().manual_seed(5))
    assert relative_error(FoldedAttention(stock)(x), stock(x)) < 1e-5


@torch.no_grad()
def test_batched_decoding_equals_one_image_at_a_time() -> None:
    sam = build_sam("vit_t").eval()
    randomise(sam.mask_decoder, 6)
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(3, 64, 16, 16, generator=generator)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    masks, iou = decode_masks(
        sam, embeddings, sparse.expand(3, -1, -1), dense.expand(3, -1, -1, -1)
    )
    for i in range(3):
        one_masks, one_iou = sam.mask_decoder.predict_masks(
            image_embeddings=embeddings[i : i + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        assert torch.allclose(masks[i : i + 1], one_masks, atol=1e-4, rtol=1e-4)
        assert torch.allclose(iou[i : i + 1], one_iou, atol=1e-4)


@torch.no_grad()
def test_lora_starts_at_nothing_and_merges_exactly() -> None:
    sam = build_sam("vit_t").eval()
    randomise(sam.image_encoder, 8)
    plain = copy.deepcopy(sam.image_encoder)
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(9))
    add_adapter(sam, 4)
    assert torch.equal(sam.image_encoder(images), plain(images))
    generator = torch.Generator().manual_seed(10)
    for block in sam.image_encoder.blocks:
        for b in (block.attn.qkv.b_q, block.attn.qkv.b_v):
            b.data = torch.randn(b.shape, generator=generator) * 0.1
    adapted = sam.image_encoder(images)
    assert relative_error(adapted, plain(images)) > 1e-3
    merge_lora(sam)
    assert relative_error(sam.image_encoder(images), adapted) < 1e-5
    assert list(sam.image_encoder.state_dict()) == list(plain.state_dict())


def test_lora_leaves_the_encoder_frozen() -> None:
    sam = build_sam("vit_t")
    names = add_adapter(sam, 4)
    assert {name for name in names if not name.startswith("mask_decoder.")} == {
        "prompt_encoder.no_mask_embed.weight",
        *(
            f"image_encoder.blocks.{i}.attn.qkv.{name}"
            for i in range(6)
            for name in ("a_q", "b_q", "a_v", "b_v")
        ),
    }
    assert set(names) == {n for n, p in sam.named_parameters() if p.requires_grad}


def test_input_frame_keeps_the_aspect_and_pads() -> None:
    images = [np.full((30, 60, 3), 200, np.uint8), np.full((64, 16, 3), 100, np.uint8)]
    pixels, valid_hw = to_input_frame(images, 128)
    assert pixels.shape == (2, 3, 128, 128)
    assert valid_hw.tolist() == [[64, 128], [128, 32]]
    inside = inside_image(valid_hw, (128, 128))
    assert inside.sum(dim=(1, 2)).tolist() == [64 * 128, 128 * 32]
    assert (pixels[0, 0][inside[0]] == 200).all()
    assert (pixels[0, 0][~inside[0]] == 0).all()


def test_client_frame_crops_the_padding() -> None:
    """A 2:1 image fills the frame's upper half; the padding's class 1 is cut off."""
    logits = torch.zeros(1, 2, 32, 32)
    logits[:, 0, :16], logits[:, 1, 16:] = 9.0, 9.0
    probability = to_client_frame(logits, torch.tensor([[64, 128]]), (20, 20))
    assert probability.shape == (1, 2, 20, 20)
    assert float(probability[:, 0].min()) > 0.999
    assert torch.allclose(probability.sum(dim=1), torch.ones(1, 20, 20))


def test_client_frame_keeps_geometry() -> None:
    """A quadrant of the logits becomes the same quadrant at any output size."""
    logits = torch.zeros(1, 2, 64, 64)
    logits[:, 1, :32, 32:] = 9.0
    logits[:, 0] = 4.5
    for size in (16, 64, 100):
        mask = to_client_frame(logits, torch.tensor([[256, 256]]), (size, size)).argmax(dim=1)[0]
        expected = torch.zeros(size, size, dtype=torch.int64)
        expected[: size // 2, size // 2 :] = 1
        assert torch.equal(mask, expected)


def test_image_score_is_of_the_classes_shown() -> None:
    masks = torch.tensor([[[0, 1]], [[0, 0]], [[1, 2]]])
    iou = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.2, 0.3], [0.7, 0.4, 0.6]])
    assert image_score(masks, iou).tolist() == pytest.approx([0.5, 0.8, 0.5])


def test_real_iou_by_hand() -> None:
    """Prediction 1 1 0 0, truth 1 0 0 ignored: foreground 1/2, background 1/2."""
    logits = torch.tensor([[[[0.0, 0, 1, 1]], [[1, 1, 0, 0]]]])
    target = torch.tensor([[[1, 0, 0, IGNORE]]])
    assert real_iou(logits, target).tolist() == [[0.5, 0.5]]


def test_calibration_error_by_hand() -> None:
    """Ten pixels at 0.8, six right: |0.6 - 0.8|; ten at 0.95, all right: 0.05; mean 0.125."""
    confidence = np.array([0.8] * 10 + [0.95] * 10, np.float32)
    hit = np.array([True] * 6 + [False] * 4 + [True] * 10)
    reliability = Reliability()
    for part in (slice(0, 7), slice(7, 20)):  # additive
        reliability.add(confidence[part], hit[part])
    assert reliability.error() == pytest.approx(0.125, abs=1e-6)
    bins = reliability.bins()
    assert bins["pixels"] == [0] * 12 + [10, 0, 10]
    assert bins["accuracy"] == [None] * 12 + [0.6, None, 1.0]
    assert bins["confidence"][12] == pytest.approx(0.8)


@torch.no_grad()
def test_a_timm_backbone_becomes_a_teacher() -> None:
    sam = build_sam("timm:mobilenetv3_small_050", input_size=128, num_multimask=2).eval()
    pixels = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    logits, iou = forward(sam, pixels.to(torch.uint8), torch.ones(2, 128, 128, dtype=torch.bool))
    assert logits.shape == (2, 3, 32, 32)
    assert iou.shape == (2, 3)


@pytest.mark.parametrize(
    ("variant", "size", "message"),
    [
        ("vit_x", None, "sam.variant: 'vit_x' is unknown"),
        ("vit_b", 512, "sam.input_size: 512 does not fit vit_b"),
        ("timm:no_such_model", None, "is no timm model with feature maps"),
    ],
)
def test_bad_variants(variant: str, size: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_sam(variant, input_size=size)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_auto_precision_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu, "vit_b") == expected
    assert resolve_precision("auto", cpu, "timm:resnet18") == "fp32"
    assert resolve_precision("bf16", cpu, "timm:resnet18") == "bf16"
    with pytest.raises(ConfigError) as caught:
        resolve_precision("fp16", cpu, "vit_b")
    assert str(caught.value) == ("precompute.precision: fp16 needs a GPU; use auto, bf16 or fp32")


def test_bfloat16_keeps_the_logits() -> None:
    """The encoder rounds, the decoder does not: within 2 % of float32 in norm."""
    sam = build_base(SamConfig(), num_classes=1).eval().requires_grad_(False)
    scene = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 255
    inside = torch.ones(2, 256, 256, dtype=torch.bool)
    with torch.inference_mode():
        exact, _ = forward(sam, scene, inside)
        half, iou = forward(sam, scene, inside, dtype=torch.bfloat16)
    assert half.dtype == iou.dtype == torch.float32
    assert 0 < relative_error(half, exact) < 0.02


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_label_with_a_probability_that_is_not_finite_has_no_score(value: float) -> None:
    """Eight bits of confidence could not tell."""
    probabilities, iou = torch.full((3, 2, 4, 4), 0.5), torch.full((3, 2), 0.75)
    probabilities[1, 1, 2, 2] = value
    _, confidences, score = to_labels(probabilities, iou)
    assert confidences.dtype == torch.uint8
    assert score.isnan().tolist() == [False, True, False]
    assert float(score[0]) == 0.75
