"""Pretraining of ``vit_t`` on generated scenes: the weights that the package ships come from here.

The recipe follows Kirillov et al. (Segment Anything, 2023) at toy size: MSE for the IoU head, point
and box prompts, and the best of three masks where one point is ambiguous. The mask loss is
cross-entropy and Dice 1:1: SAM's focal loss (20:1) kept a network this small, trained from
scratch, at empty masks. Same seed, steps and threads on the same machine give the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.disk import write_bytes
from pipeline.sam.build import build_sam, decode_masks
from tools.pretrain_vit_t.scenes import generate_scene

OBJECTS_PER_SCENE = 4
_VALIDATION_SEED_OFFSET = 1_000_003

Scene = tuple[Tensor, Tensor]


class SceneDataset(Dataset[Scene]):
    """Scene ``i``: image (3, S, S) float 0..255 and ``OBJECTS_PER_SCENE`` masks (M, S, S) bool."""

    def __init__(self, seed: int, first: int, count: int) -> None:
        self.seed, self.first, self.count = seed, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Scene:
        image, regions = generate_scene(self.seed, self.first + i)
        rng = np.random.default_rng([self.seed, self.first + i, 1])
        chosen = rng.choice(
            len(regions), OBJECTS_PER_SCENE, replace=len(regions) < OBJECTS_PER_SCENE
        )
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        return pixels, torch.from_numpy(regions[chosen] > 0.5)


def sample_points(masks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` pixels inside each mask (P, S, S) bool; returns x, y (P, count, 2) float."""
    weights = masks.flatten(1).float()
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    width = masks.shape[-1]
    return torch.stack([index % width, index // width], dim=-1).float() + 0.5


def boxes_of(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Return boxes (P, 4) xyxy, px, around masks (P, S, S) bool, jittered by up to a tenth."""
    size = masks.shape[-1]
    cols, rows = masks.any(dim=1), masks.any(dim=2)
    coords = torch.arange(size)
    low = [torch.where(m, coords, size).amin(dim=1) for m in (cols, rows)]
    high = [torch.where(m, coords, -1).amax(dim=1) + 1 for m in (cols, rows)]
    boxes = torch.stack([*low, *high], dim=1).float()
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    jitter = (torch.rand(boxes.shape, generator=generator) * 2 - 1) * 0.1 * extent
    return (boxes + jitter).clamp(0, size)


def mask_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy + Dice (...) of logits (..., h, w) against soft targets in [0, 1]."""
    probability = torch.sigmoid(logits)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    overlap = (probability * targets).sum(dim=(-2, -1))
    dice = 1 - (2 * overlap + 1) / ((probability + targets).sum(dim=(-2, -1)) + 1)
    return bce.mean(dim=(-2, -1)) + dice


def _prompt(sam: Sam, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    """Return sparse and dense tokens that prompt for masks (P, S, S), and whether ambiguously."""
    kind = int(torch.randint(0, 3, (), generator=generator))
    points, boxes = None, None
    if kind == 0:
        boxes = boxes_of(masks, generator)
    else:
        coords = sample_points(masks, 1 if kind == 1 else 3, generator)
        points = (coords, torch.ones(coords.shape[:2]))
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    return sparse, dense, kind == 1


def pretraining_loss(
    sam: Sam, images: Tensor, masks: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the loss and the chosen masks' IoU of images (B, 3, S, S) and masks (B, M, S, S).

    One prompt kind a batch; a single point scores the best of the three ambiguous masks, a box or
    three points score the unambiguous one.
    """
    per_image = masks.shape[1]
    embeddings = sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)
    embeddings = embeddings.repeat_interleave(per_image, dim=0)
    sparse, dense, ambiguous = _prompt(sam, masks.flatten(0, 1), generator)
    logits, iou_estimate = decode_masks(sam, embeddings, sparse, dense)
    targets = F.avg_pool2d(masks.flatten(0, 1).float()[:, None], 4)  # (P, 1, h, w)
    used = slice(1, None) if ambiguous else slice(0, 1)
    logits, iou_estimate = logits[:, used], iou_estimate[:, used]
    losses = mask_losses(logits, targets.expand_as(logits))
    with torch.no_grad():
        predicted, truth = logits > 0, targets > 0.5
        union = (predicted | truth).sum(dim=(-2, -1)).clamp(min=1)
        iou = (predicted & truth).sum(dim=(-2, -1)) / union
    best = losses.argmin(dim=1, keepdim=True)
    loss = losses.gather(1, best).mean() + F.mse_loss(iou_estimate, iou)
    return loss, iou.gather(1, best).mean()


def pretrain(
    out: Path,
    *,
    steps: int,
    seed: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    progress: Callable[[int, float, float], None] | None = None,
) -> float:
    """Train ``vit_t`` from scratch and write its weights to ``out`` as float16 safetensors.

    Args:
        progress: called after each step with (step, loss, IoU of the batch).

    Returns:
        mean IoU on 64 scenes that training never saw, prompts of every kind.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sam = build_sam("vit_t")
    torch.nn.init.trunc_normal_(sam.image_encoder.pos_embed, std=0.02)
    decay = [p for p in sam.parameters() if p.ndim >= 2]
    rest = [p for p in sam.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    loader = DataLoader(SceneDataset(seed, 0, steps * batch_size), batch_size, num_workers=1)
    for step, (images, masks) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss, iou = pretraining_loss(sam, images, masks, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, float(loss.detach()), float(iou))
    state = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
    write_bytes(out, safetensors.torch.save(state, metadata={"variant": "vit_t"}))
    return validate(sam, seed + _VALIDATION_SEED_OFFSET)


@torch.no_grad()
def validate(sam: Sam, seed: int, scenes: int = 64) -> float:
    """Return the mean IoU over all prompts on unseen scenes, of the best of ambiguous masks."""
    sam.eval()
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(SceneDataset(seed, 0, scenes), batch_size=8)
    return float(np.mean([float(pretraining_loss(sam, x, y, generator)[1]) for x, y in loader]))
