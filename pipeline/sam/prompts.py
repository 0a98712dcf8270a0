"""Prompts for SAM as it comes, without adaptation: a grid of points, or one box an image.

A prompt's mask is a foreground logit z a pixel. The two-class logits (0, z) make it look like an
adapted teacher of one class: their softmax is sigmoid(z), so frames, labels and confidences are
those of ``pipeline.sam.teacher``. Where SAM finds nothing, z is 0: background, at even odds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
)
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sam.build import decode_masks
from pipeline.sam.coarse import COARSE_SIDE, coarse_log_odds

MULTIMASK = 3  # masks that SAM proposes for an ambiguous prompt, beside the unambiguous one

# the defaults of segment-anything's SamAutomaticMaskGenerator
_POINTS_PER_PASS = 64
_MIN_IOU = 0.88
_MIN_STABILITY = 0.95
_STABILITY_OFFSET = 1.0  # of the logit, either way
_EDGE = 20 / 1024  # of the input's side: a mask this near to a side of the image reaches it

#: (sam, embeddings (B, C, h, w), pixels (B, 3, S, S) in 0..255, valid_hw (B, 2) as height, width)
#: -> two-class logits (B, 2, S/4, S/4) of the padded frame and IoU estimates (B, 2).
Prompter = Callable[[Sam, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def why_not_prompted(config: Config) -> str | None:
    """Why the settings' SAM cannot be prompted, or None if it can."""
    if config.sam.variant.startswith("timm:"):
        return f"{config.sam.variant} was never trained with prompts; only vit_* were"
    if config.data.num_classes > 1:
        return f"a prompt's mask has one class, data.num_classes is {config.data.num_classes}"
    return None


def check_prompt(config: Config) -> None:
    """Refuse ``sam.prompt`` where SAM as it comes cannot follow it.

    Raises:
        ConfigError: a ``timm:`` teacher, or more than one class.
    """
    reason = why_not_prompted(config)
    if config.sam.prompt != "none" and reason is not None:
        raise ConfigError(f"sam.prompt: found '{config.sam.prompt}', but {reason}; set it to none")


class PointGrid:
    """Every point of a grid prompts SAM for three masks; the image's best mask is its label."""

    def __init__(self, points_per_side: int) -> None:
        grid = build_point_grid(points_per_side)  # (n * n, 2) as x, y in 0..1
        self.grid = torch.from_numpy(grid).float()

    def __call__(
        self, sam: Sam, embeddings: Tensor, pixels: Tensor, valid_hw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Prompter``; the estimate is the best mask's, 0 where there is no mask."""
        found = [
            self._best(sam, embedding, extent, pixels.shape[-1])
            for embedding, extent in zip(embeddings, valid_hw.tolist(), strict=True)
        ]
        return two_class(torch.stack([z for z, _ in found]), torch.stack([iou for _, iou in found]))

    def _best(
        self, sam: Sam, embedding: Tensor, extent: Sequence[int], input_size: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (h, w) of one image's best mask, and its IoU estimate ()."""
        height, width = extent
        side = 4 * embedding.shape[-1]  # the decoder upscales the embedding by four
        rows, cols = (-(-length * side // input_size) for length in extent)  # in the image
        points = (self.grid * torch.tensor([width, height])).to(embedding.device)
        best_rank = 0.0
        best = (points.new_zeros((side, side)), points.new_zeros(()))
        for chunk in points.split(_POINTS_PER_PASS):  # bounds memory, as segment-anything does
            labels = torch.ones((len(chunk), 1), device=chunk.device)
            logits, iou = _decode(
                sam, embedding.expand(len(chunk), -1, -1, -1), points=(chunk[:, None], labels)
            )
            logits, iou = logits[:, 1:].flatten(0, 1).float(), iou[:, 1:].flatten().float()
            rank = rank_masks(logits[:, :rows, :cols], iou)
            top = int(rank.argmax())
            if float(rank[top]) > best_rank:  # a copy: a view would keep the whole pass alive
                best_rank, best = float(rank[top]), (logits[top].clone(), iou[top])
        return best


def rank_masks(logits: Tensor, iou: Tensor) -> Tensor:
    """How much each of M masks is worth as the image's label, (M,) float; 0 = not at all.

    Predicted IoU times stability (the IoU of the masks at logits +1 and -1, segment-anything's
    ``calculate_stability_score``). Masks that pass segment-anything's thresholds (0.88 and 0.95)
    come before all others; the thresholds were set for the official weights, so others are ranked
    too, not dropped. A mask that reaches all four sides of the image is worth nothing: it is the
    whole image, its background or its frame, which SAM segments best of all. Nor is an empty one.

    Args:
        logits: (M, h, w) float, cropped to the image. iou: (M,) float, predicted.
    """
    masks = logits > 0
    stability = calculate_stability_score(logits, 0.0, _STABILITY_OFFSET).nan_to_num(0.0)
    passes = (iou > _MIN_IOU) & (stability >= _MIN_STABILITY)
    rows, cols = masks.shape[-2:]
    reach = _EDGE * max(rows, cols)
    left, top, right, bottom = batched_mask_to_box(masks).unbind(dim=-1)
    edges = (left <= reach) & (top <= reach)
    edges &= (right >= cols - 1 - reach) & (bottom >= rows - 1 - reach)
    allowed = masks.flatten(1).any(dim=1) & ~edges
    rank: Tensor = (iou.clamp(0, 1) * stability + passes) * allowed
    return rank


class CoarseBox:
    """One box an image, around all of a coarse model's foreground; an empty one stays empty."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def __call__(
        self, sam: Sam, embeddings: Tensor, pixels: Tensor, valid_hw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Prompter``; where the coarse model finds nothing, its logits are the answer."""
        with torch.autocast(pixels.device.type, enabled=False):
            odds = coarse_log_odds(self.model, pixels)
        scale = pixels.shape[-1] / COARSE_SIDE
        boxes, found = boxes_around(odds, valid_hw / scale)
        logits, iou = _decode(sam, embeddings, boxes=boxes * scale)
        # one box is no ambiguous prompt: segment-anything's first token answers it
        coarse = F.interpolate(odds[:, None], logits.shape[-2:], mode="bilinear")[:, 0]
        z = torch.where(found[:, None, None], logits[:, 0], coarse.clamp(max=0).to(logits))
        return two_class(z, torch.where(found, iou[:, 0], 0.0))


def boxes_around(odds: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor]:
    """The box around each image's foreground, and whether it has any.

    Args:
        odds: (B, s, s) log-odds of the foreground in the padded frame.
        valid_hw: (B, 2) float, height and width of the image in that frame; the rest is padding.

    Returns:
        boxes_xyxy (B, 4) float, edges in the same pixels (meaningless where there is nothing), and
        found (B,) bool.
    """
    steps = torch.arange(odds.shape[-1], device=odds.device) + 0.5  # a pixel's centre decides
    inside = (steps < valid_hw[:, :1])[:, :, None] & (steps < valid_hw[:, 1:])[:, None, :]
    masks = (odds > 0) & inside
    boxes = batched_mask_to_box(masks).float()
    boxes[:, 2:] += 1  # from the last pixel to its far edge
    return boxes, masks.flatten(1).any(dim=1)


def two_class(foreground: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 2, h, w) whose softmax is sigmoid(z) of z (B, h, w); one estimate for both."""
    logits = torch.stack([torch.zeros_like(foreground), foreground], dim=1)
    return logits, iou[:, None].expand(-1, 2)


def _decode(
    sam: Sam,
    embeddings: Tensor,
    *,
    points: tuple[Tensor, Tensor] | None = None,
    boxes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``decode_masks`` with one prompt for each embedding; positions in input pixels, fp32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    return decode_masks(sam, embeddings, sparse.to(embeddings), dense.to(embeddings))
