"""SAM as it comes, without adaptation: prompted by a grid of points.

A prompt's mask is a foreground logit z a pixel. The two-class logits (0, z) make it look like an
adapted teacher of one class: their softmax is sigmoid(z), so frames, labels and confidences are
those of ``pipeline.sam.teacher``. Where SAM finds nothing, z is 0: background, at even odds.

Everything behind the encoder is float32, as positions need it. Points within a mask that was found
already are prompted all the same: theirs may be the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
)
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sam.frame import LOGIT_STRIDE
from pipeline.sam.point_decoder import PointDecoder, Prompted

MULTIMASK = 3  # masks that SAM proposes for an ambiguous prompt, beside the unambiguous one

# the defaults of segment-anything's SamAutomaticMaskGenerator
POINTS_PER_PASS = 64
MASKS_PER_PASS = 16  # prompts whose masks are made at once; later ones may have no chance by then
_MIN_IOU = 0.88
_MIN_STABILITY = 0.95
_STABILITY_OFFSET = 1.0  # of the logit, either way
_EDGE = 20 / 1024  # of the input's side: a mask this near to a side of the image reaches it


class Decoder(Protocol):
    """The mask decoder of one image; its estimates come before the masks."""

    def prompt(self, points: Tensor) -> Prompted:
        """Take foreground points (n, 1, 2) as x, y in input pixels."""
        ...

    def masks(self, prompted: Prompted, chosen: Tensor) -> Tensor:
        """Return the masks' logits (m, MULTIMASK, 4h, 4w) of the chosen (m,) prompts."""
        ...


def why_not_prompted(config: Config) -> str | None:
    """Say why the settings' SAM cannot be prompted; None if it can."""
    if config.sam.variant.startswith("timm:"):
        return (
            f"{config.sam.variant} was never trained with prompts; only vit_* and mobile_sam were"
        )
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


def check_views(config: Config) -> None:
    """Refuse several views of a prompted SAM, whose masks may be of other objects in each.

    Raises:
        ConfigError: ``precompute.views`` is above 1 and ``sam.prompt`` is not none.
    """
    views = config.precompute.views
    if views > 1 and config.sam.prompt != "none":
        raise ConfigError(
            f"precompute.views: found {views}, but sam.prompt '{config.sam.prompt}' picks one mask "
            "of each view, perhaps of another object; set precompute.views to 1"
        )


class PointGrid:
    """Every point of a grid prompts SAM for three masks; the image's best mask is its label."""

    def __init__(
        self, points_per_side: int, *, decoder: Callable[[Sam, Tensor], Decoder] = PointDecoder
    ) -> None:
        grid = build_point_grid(points_per_side)  # (n * n, 2) as x, y in 0..1
        self.grid = torch.from_numpy(grid).float()
        self.decoder = decoder

    def __call__(self, sam: Sam, embeddings: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two-class logits and IoU estimates of each image's best mask.

        Args:
            embeddings: (B, C, h, w). valid_hw: (B, 2), height and width of the image in the frame.

        Returns:
            logits (B, 2, 4h, 4w) of the frame; estimates (B, 2), 0 where there is no mask.
        """
        pairs = zip(embeddings, valid_hw.tolist(), strict=True)
        found = [self._best(sam, one, size_hw) for one, size_hw in pairs]
        foreground = torch.stack([logits for logits, _ in found])
        iou = torch.stack([estimate for _, estimate in found])
        logits = torch.stack([torch.zeros_like(foreground), foreground], dim=1)
        return logits, iou[:, None].expand(-1, 2)

    def _best(self, sam: Sam, embedding: Tensor, size_hw: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the logits (4h, 4w) of one image's best mask, and its IoU estimate ()."""
        rows, cols = (-(-length // LOGIT_STRIDE) for length in size_hw)  # in the image
        shape = [4 * side for side in embedding.shape[-2:]]  # the decoder upscales by four
        points = (self.grid * torch.tensor(size_hw[::-1])).to(embedding.device)
        best_rank = 0.0
        best = (points.new_zeros(shape), points.new_zeros(()))
        decoder = self.decoder(sam, embedding)
        for part in points.split(POINTS_PER_PASS):  # bounds memory, as segment-anything does
            prompted = decoder.prompt(part[:, None])
            if not bool(prompted.iou.isfinite().all()):  # else it would pass for no mask at all
                return best[0] + torch.nan, best[1] + torch.nan
            highest = highest_rank(prompted.iou).amax(dim=1)
            for some in torch.arange(len(part), device=points.device).split(MASKS_PER_PASS):
                chosen = some[highest[some] > best_rank]
                if not len(chosen):
                    continue
                logits = decoder.masks(prompted, chosen).flatten(0, 1).float()
                iou = prompted.iou[chosen].flatten().float()
                rank = rank_masks(logits[:, :rows, :cols], iou)
                top = int(rank.argmax())
                if float(rank[top]) > best_rank:  # a copy: a view would keep the pass alive
                    best_rank, best = float(rank[top]), (logits[top].clone(), iou[top])
        return best


def highest_rank(iou: Tensor) -> Tensor:
    """Return what ``rank_masks`` gives masks of these predicted IoUs at most: perfect stability."""
    return iou.clamp(0, 1) + (iou > _MIN_IOU)


def rank_masks(logits: Tensor, iou: Tensor) -> Tensor:
    """Say how much each of M masks is worth as the image's label: (M,) float, 0 = not at all.

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
