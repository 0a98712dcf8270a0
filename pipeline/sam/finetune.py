"""``samfed finetune-sam``: adapt the teacher to the server's labelled set (the SAMed recipe).

Zhang & Liu, "Customized Segment Anything Model for Medical Image Segmentation", 2023: LoRA on the
query and value of every encoder block, the mask decoder and the default prompt embedding trained,
no prompts, 0.2 CE + 0.8 Dice on the low-resolution logits, AdamW, warm-up and polynomial decay.
A ``timm:`` teacher is trained whole. The IoU head learns the real IoU by mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.augment import (
    HEAVY,
    Geometry,
    change_appearance,
    random_affine,
    warp_images,
    warp_labels,
)
from pipeline.card import CARD_FILE, TeacherCard
from pipeline.config import Config, SamConfig
from pipeline.devices import resolve_device
from pipeline.files import file_sha256, folder_beside, write_json
from pipeline.labelled import LabelledImage, load_labelled
from pipeline.locks import writer_lock
from pipeline.losses import IGNORE, supervised_loss
from pipeline.metrics import dice_score
from pipeline.partition import Partition, load_partition
from pipeline.sam.frame import to_input_frame
from pipeline.sam.lora import add_lora, merge_lora
from pipeline.sam.teacher import (
    ADAPTER_FILE,
    LOGIT_STRIDE,
    PROMPT,
    Teacher,
    base_checkpoint,
    build_base,
    forward,
)

Progress = Callable[[str, int, int], None]

_MAX_GRADIENT_NORM = 1.0  # usual for transformers


def finetune(config: Config, *, progress: Progress | None = None) -> TeacherCard:
    """Adapt the teacher and write ``cache/teacher/`` (adapter and card).

    Same seed, same machine and same number of torch threads give the same bytes on a CPU.

    Raises:
        StageError: no partition yet. LockedStoreError: another process fine-tunes into this cache.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    with writer_lock(cache / "locks" / "teacher.lock"), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return _finetune(config, partition, progress)


def _finetune(config: Config, partition: Partition, progress: Progress | None) -> TeacherCard:
    sam = build_base(config.sam, num_classes=config.data.num_classes)
    rank = None if config.sam.variant.startswith("timm:") else config.sam.lora_rank
    if rank is not None:
        add_lora(sam.image_encoder, rank)
        sam.prompt_encoder.requires_grad_(False)
        sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    trained = [name for name, parameter in sam.named_parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in sam.parameters())
    side = sam.image_encoder.img_size
    pixels, masks = _frames(load_labelled(config, partition, partition.server.train), side)
    _train(sam, pixels, masks, config, progress)
    # what fine-tuning changed: the trained parameters, and the buffers of a backbone trained whole
    state = sam.state_dict()
    changed = trained if rank is not None else list(state)
    folder = config.cache.root / "teacher"
    with folder_beside(folder) as building:
        adapter = building / ADAPTER_FILE
        tensors = {name: state[name].detach().cpu().contiguous() for name in changed}
        safetensors.torch.save_file(tensors, adapter)
        card = TeacherCard(
            variant=config.sam.variant,
            input_size=sam.image_encoder.img_size,
            num_classes=config.data.num_classes,
            prompt=PROMPT,
            lora_rank=rank,
            base_sha256=base_checkpoint(config.sam)[1],
            adapter_sha256=file_sha256(adapter),
            parameters=size,
            trained_parameters=sum(state[name].numel() for name in trained),
            server_sha256=partition.server_sha256(),
            train_images=len(partition.server.train),
            calibration_images=len(partition.server.calibration),
            calibration_dice=0.0,
            seed=config.seed,
        )
        if rank is not None:
            merge_lora(sam.image_encoder)
        teacher = Teacher(sam, card, device=config.sam.device, precision="fp32")
        dice = _mean_dice(teacher, load_labelled(config, partition, partition.server.calibration))
        card = card.model_copy(update={"calibration_dice": dice})
        write_json(building / CARD_FILE, card.model_dump())
    return card


def _mean_dice(teacher: Teacher, images: Iterable[LabelledImage]) -> float:
    """Mean foreground Dice per image, at the images' own size."""
    scores = []
    for item in images:
        probabilities, _ = teacher.probabilities([item.image], item.mask.shape)
        predicted = probabilities[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        scores.append(dice_score(predicted, item.mask, num_classes=teacher.card.num_classes))
    return float(np.mean(scores))


def _frames(items: Iterable[LabelledImage], size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) uint8 and masks (N, S, S) uint8 in the input frame; padding = IGNORE."""
    pixels, masks = [], []
    for item in items:  # one at a time: originals may be large
        frame, extents = to_input_frame([item.image], size)
        height, width = extents[0].tolist()
        resized = Image.fromarray(item.mask).resize((width, height), Image.Resampling.NEAREST)
        mask = np.full((size, size), IGNORE, np.uint8)
        mask[:height, :width] = np.asarray(resized)
        pixels.append(frame)
        masks.append(torch.from_numpy(mask))
    return torch.cat(pixels), torch.stack(masks)


def _optimizer(sam: Sam, config: SamConfig) -> torch.optim.AdamW:
    encoder_rate = config.learning_rate
    backbone: list[torch.nn.Parameter] = []
    if config.variant.startswith("timm:"):
        encoder_rate = config.encoder_learning_rate
        backbone = list(sam.image_encoder.backbone.parameters())
    inside = {id(parameter) for parameter in backbone}
    rest = [p for p in sam.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": rest, "lr": config.learning_rate}]
    if backbone:
        groups.append({"params": backbone, "lr": encoder_rate})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def _train(
    sam: Sam, pixels: Tensor, masks: Tensor, config: Config, progress: Progress | None
) -> None:
    """Fine-tune ``sam`` in place; the last, smaller batch of an epoch is filled from its start."""
    settings = config.sam
    device = resolve_device(settings.device)
    sam.to(device).train()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = _optimizer(sam, settings)
    batch = min(settings.batch_size, len(pixels))
    per_epoch = -(-len(pixels) // batch)
    total = per_epoch * settings.epochs
    warmup = max(1, round(settings.warmup_fraction * total))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return float((1 - (step - warmup) / max(1, total - warmup)) ** settings.decay_power)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(pixels), generator=generator)
            order = torch.cat([order, order])[: per_epoch * batch]
        chosen = order[(step % per_epoch) * batch :][:batch]
        optimizer.zero_grad()
        loss = _loss(sam, pixels[chosen], masks[chosen], settings, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("fine-tuning the teacher", step + 1, total)
    sam.eval()


def _loss(
    sam: Sam, pixels: Tensor, masks: Tensor, settings: SamConfig, generator: torch.Generator
) -> Tensor:
    """Loss of one augmented batch: 0.2 CE + 0.8 Dice, and the IoU head's squared error."""
    maps = random_affine(len(pixels), Geometry(), generator)
    images = warp_images(pixels.float() / 255, maps, padding="zeros")
    target = warp_labels(masks, maps, padding="zeros", fill=IGNORE)
    images = change_appearance(images, HEAVY, generator) * 255
    device = sam.pixel_mean.device
    images, target = images.to(device), target.to(device).long()
    logits, iou = forward(sam, images, target != IGNORE)
    # the cell's centre decides its class; interpolation would invent classes
    low = target[:, LOGIT_STRIDE // 2 :: LOGIT_STRIDE, LOGIT_STRIDE // 2 :: LOGIT_STRIDE]
    # supervised_loss weighs CE and Dice 2(1-a) and 2a
    loss = supervised_loss(logits, low, dice_weight=settings.dice_weight) / 2
    return loss + F.mse_loss(iou, _real_iou(logits.detach(), low))


def _real_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of each class's predicted region with the truth, (B, K+1); 1 where both are empty."""
    classes = logits.shape[1]
    valid = target != IGNORE
    predicted = F.one_hot(logits.argmax(dim=1), classes).bool() & valid[..., None]
    truth = F.one_hot(target.masked_fill(~valid, 0), classes).bool() & valid[..., None]
    overlap = (predicted & truth).sum(dim=(1, 2)).float()
    union = (predicted | truth).sum(dim=(1, 2)).float()
    return torch.where(union > 0, overlap / union.clamp(min=1), torch.ones_like(union))
