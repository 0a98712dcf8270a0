"""``samfed finetune-sam``: adapt the teacher to the server's labelled set (the SAMed recipe).

Zhang & Liu, "Customized Segment Anything Model for Medical Image Segmentation", 2023: LoRA on the
query and value of every encoder block, the mask decoder and the default prompt embedding trained,
no prompts, 0.2 CE + 0.8 Dice on the low-resolution logits, AdamW, warm-up and polynomial decay.
A ``timm:`` teacher is trained whole. The IoU head learns the real IoU by mean squared error.
Under ``sam.prompt`` SAM stays as it comes: nothing is adapted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.config import Config, SamConfig
from pipeline.data.images import LabelledImage, load_labelled
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import file_sha256, folder_beside, write_json, writer_lock
from pipeline.runtime import resolve_device
from pipeline.sam.checkpoints import State, base_checkpoint, build_base, note_unofficial
from pipeline.sam.frame import LOGIT_STRIDE, to_input_frame
from pipeline.sam.lora import add_adapter, merge_lora
from pipeline.sam.prompts import MULTIMASK, PointGrid, check_prompt
from pipeline.sam.teacher import ADAPTER_FILE, Teacher, forward
from pipeline.segmentation.augmentation import (
    HEAVY,
    change_appearance,
    random_affine,
    sampling_grid,
    warp_images,
    warp_labels,
)
from pipeline.segmentation.losses import IGNORE, supervised_loss
from pipeline.segmentation.metrics import dice_score
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard

log = logging.getLogger("samfed.sam.finetune")

Progress = Callable[[str, int, int], None]

_MAX_GRADIENT_NORM = 1.0  # usual for transformers


@dataclass(frozen=True)
class Epoch:
    """Result of one pass over the training part."""

    number: int  # from 1
    loss: float  # mean over its batches


def finetune(config: Config, *, progress: Progress | None = None) -> TeacherCard:
    """Adapt the teacher and write ``cache/teacher/``: the card, and what was trained.

    Same seed, same machine and same number of torch threads give the same bytes on a CPU.

    Raises:
        ConfigError: this teacher cannot follow ``sam.prompt``. StageError: no partition yet.
        LockedStoreError: another process fine-tunes into this cache.
    """
    check_prompt(config)
    note_unofficial(config.sam)
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    with writer_lock(cache / "locks" / "teacher.lock"):
        teacher, adapter = make_teacher(config, partition, progress=progress)
        calibration = load_labelled(config, partition, partition.server.calibration)
        with folder_beside(cache / "teacher") as folder:
            measured: dict[str, object] = {"calibration_dice": _mean_dice(teacher, calibration)}
            if adapter:
                safetensors.torch.save_file(adapter, folder / ADAPTER_FILE)
                measured["adapter_sha256"] = file_sha256(folder / ADAPTER_FILE)
            card = teacher.card.model_copy(update=measured)
            write_json(folder / CARD_FILE, card.as_json())
    return card


def make_teacher(
    config: Config, partition: Partition, *, progress: Progress | None = None
) -> tuple[Teacher, State]:
    """Train the teacher that the settings ask for; under a prompt, take SAM as it comes.

    Returns:
        the teacher, whose card has neither its Dice nor its adapter's sha256 yet, and the adapter's
        tensors by name, none under a prompt.
    """
    adapter: State = {}
    prompter, device = None, config.sam.device
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.sam.prompt == "none":
            sam, adapter = _adapt(config, partition, progress)
        else:
            sam = build_base(config.sam, num_classes=MULTIMASK)
            prompter = PointGrid(config.sam.points_per_side)
    card = _card(config, partition, sam, adapter)
    merge_lora(sam)
    return Teacher(sam, card, device=device, precision="fp32", prompter=prompter), adapter


def _adapt(config: Config, partition: Partition, progress: Progress | None) -> tuple[Sam, State]:
    """Train a teacher; returns it, LoRA not merged, and what of its state was trained."""
    sam = build_base(config.sam, num_classes=config.data.num_classes)
    names = add_adapter(sam, _rank(config.sam))
    items = load_labelled(config, partition, partition.server.train)
    pixels, masks = _frames(items, sam.image_encoder.img_size)
    sam.to(resolve_device(config.sam.device))
    for epoch in train(sam, pixels, masks, config, progress=progress):
        log.debug("epoch %d: loss %.4f", epoch.number, epoch.loss)
    state = sam.state_dict()
    return sam, {name: state[name].cpu().contiguous() for name in names}


def _rank(settings: SamConfig) -> int | None:
    """Return the rank of LoRA; None for a teacher that is trained whole or not at all."""
    has_lora = settings.prompt == "none" and not settings.variant.startswith("timm:")
    return settings.lora_rank if has_lora else None


def _card(config: Config, partition: Partition, sam: Sam, adapter: State) -> TeacherCard:
    buffers = dict(sam.named_buffers())
    trained = [value for name, value in adapter.items() if name not in buffers]
    return TeacherCard(
        variant=config.sam.variant,
        input_size=sam.image_encoder.img_size,
        num_classes=config.data.num_classes,
        prompt=config.sam.prompt_policy,
        lora_rank=_rank(config.sam),
        base_sha256=base_checkpoint(config.sam)[1],
        adapter_sha256="none",
        parameters=sum(parameter.numel() for parameter in sam.parameters()),
        trained_parameters=sum(value.numel() for value in trained),
        server_sha256=partition.server_sha256(),
        train_images=len(partition.server.train),
        calibration_images=len(partition.server.calibration),
        calibration_dice=0.0,
        seed=config.seed,
    )


def _mean_dice(teacher: Teacher, images: Iterable[LabelledImage]) -> float:
    """Return the mean foreground Dice per image, at the images' own size."""
    dice = []
    for item in images:
        probabilities, _ = teacher.probabilities([item.image], item.mask.shape)
        predicted = probabilities[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        dice.append(dice_score(predicted, item.mask, num_classes=teacher.card.num_classes))
    return float(np.mean(dice))


# --------------------------------------------------------------------------- training


def _frames(items: Iterable[LabelledImage], size: int) -> tuple[Tensor, Tensor]:
    """Put images and masks into the input frame, both (N, ..., S, S) uint8; padding is IGNORE."""
    pixels, masks = [], []
    for item in items:  # one at a time: originals may be large
        frame, valid_hw = to_input_frame([item.image], size)
        height, width = valid_hw[0].tolist()
        resized = Image.fromarray(item.mask).resize((width, height), Image.Resampling.NEAREST)
        mask = np.full((size, size), IGNORE, np.uint8)
        mask[:height, :width] = np.asarray(resized)
        pixels.append(frame)
        masks.append(torch.from_numpy(mask))
    return torch.cat(pixels), torch.stack(masks)


def train(
    sam: Sam, pixels: Tensor, masks: Tensor, config: Config, *, progress: Progress | None = None
) -> Iterator[Epoch]:
    """Train what has a gradient in ``sam``, in place, an epoch at a time.

    The last, smaller batch of an epoch is filled from its start.

    Args:
        pixels: (N, 3, S, S) uint8, padded. masks: (N, S, S) uint8, IGNORE in the padding.
    """
    settings, count = config.sam, len(pixels)
    generator = torch.Generator().manual_seed(config.seed)
    batch = min(settings.batch_size, count)
    per_epoch = -(-count // batch)
    steps = per_epoch * settings.epochs
    optimizer = _optimizer(sam, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_decay(settings, steps))
    sam.train()
    for epoch in range(settings.epochs):
        order = torch.randperm(count, generator=generator)
        batches = torch.cat([order, order])[: per_epoch * batch].split(batch)
        total = torch.zeros(())
        for step, chosen in enumerate(batches, start=epoch * per_epoch + 1):
            optimizer.zero_grad()
            loss = _loss(sam, pixels[chosen], masks[chosen], settings, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sam.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            total = total + loss.detach().cpu()
            if progress is not None:
                progress("fine-tuning the teacher", step, steps)
        yield Epoch(epoch + 1, float(total) / per_epoch)


def _optimizer(sam: Sam, settings: SamConfig) -> torch.optim.AdamW:
    """Return AdamW over all that is trained; a timm backbone has a learning rate of its own."""
    backbone = getattr(sam.image_encoder, "backbone", None)
    inside = {} if backbone is None else {id(p): p for p in backbone.parameters()}
    rest = [p for p in sam.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": rest, "lr": settings.learning_rate}]
    if inside:
        groups.append({"params": list(inside.values()), "lr": settings.encoder_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def _warm_up_then_decay(settings: SamConfig, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: a linear rise, a polynomial fall."""
    warmup = max(1, round(settings.warmup_fraction * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return float((1 - (step - warmup) / max(1, steps - warmup)) ** settings.decay_power)

    return factor


def _augment(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a random view of frames: images (B, 3, S, S) float in 0..255, masks (B, S, S) uint8."""
    grid = sampling_grid(random_affine(len(pixels), generator), pixels)
    images = warp_images(pixels.float() / 255, grid, padding="zeros")
    target = warp_labels(masks, grid, padding="zeros", fill=IGNORE)
    return change_appearance(images, HEAVY, generator) * 255, target


def _loss(
    sam: Sam, pixels: Tensor, masks: Tensor, settings: SamConfig, generator: torch.Generator
) -> Tensor:
    """Return the loss of one augmented batch: 0.2 CE + 0.8 Dice, and the IoU head's error."""
    images, target = _augment(pixels, masks, generator)
    device = sam.pixel_mean.device
    images, target = images.to(device), target.to(device).long()
    logits, iou = forward(sam, images, target != IGNORE)
    # the cell's centre decides its class; interpolation would invent classes
    low = target[:, LOGIT_STRIDE // 2 :: LOGIT_STRIDE, LOGIT_STRIDE // 2 :: LOGIT_STRIDE]
    # supervised_loss weighs CE and Dice 2(1-a) and 2a
    loss = supervised_loss(logits, low, dice_weight=settings.dice_weight) / 2
    return loss + F.mse_loss(iou, real_iou(logits.detach(), low))


def real_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Return the IoU of each class's predicted region with the truth; 1 where both are empty.

    Args:
        logits: (B, K+1, h, w). target: (B, h, w) int64 with IGNORE, which counts for nothing.

    Returns:
        (B, K+1) float32.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    predicted = (logits.argmax(dim=1, keepdim=True) == classes) & (target != IGNORE)[:, None]
    truth = target[:, None] == classes
    overlap, union = ((predicted & truth), (predicted | truth))
    ratio = overlap.sum(dim=(2, 3)) / union.sum(dim=(2, 3)).clamp(min=1)
    return ratio.masked_fill(~union.flatten(2).any(dim=2), 1.0)
