"""``samfed finetune-sam``: adapt the teacher to the server's labelled set (the SAMed recipe).

Zhang & Liu, "Customized Segment Anything Model for Medical Image Segmentation", 2023: LoRA on the
query and value of every encoder block, the mask decoder and the default prompt embedding trained,
no prompts, 0.2 CE + 0.8 Dice on the low-resolution logits, AdamW, warm-up and polynomial decay.
A ``timm:`` teacher is trained whole. The IoU head learns the real IoU by mean squared error.
Under ``sam.prompt`` SAM stays as it comes: nothing is adapted, and ``box`` trains its coarse model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor, nn

from pipeline.config import Config, SamConfig
from pipeline.data.partition import Partition, load_partition
from pipeline.data.public_set import LabelledImage, load_labelled
from pipeline.disk import file_sha256, folder_beside, write_json, writer_lock
from pipeline.runtime import resolve_device
from pipeline.sam.coarse import COARSE_FILE, COARSE_SIDE, build_coarse
from pipeline.sam.frame import to_input_frame
from pipeline.sam.lora import add_lora, merge_lora
from pipeline.sam.prompts import MULTIMASK, CoarseBox, PointGrid, Prompter, check_prompt
from pipeline.sam.teacher import (
    ADAPTER_FILE,
    LOGIT_STRIDE,
    Teacher,
    base_checkpoint,
    build_base,
    forward,
)
from pipeline.segmentation.augmentation import (
    HEAVY,
    Geometry,
    change_appearance,
    random_affine,
    sampling_grid,
    warp_images,
    warp_labels,
)
from pipeline.segmentation.losses import IGNORE, supervised_loss
from pipeline.segmentation.metrics import dice_score
from pipeline.segmentation.networks import normalise
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard

Progress = Callable[[str, int, int], None]

_MAX_GRADIENT_NORM = 1.0  # usual for transformers


def finetune(config: Config, *, progress: Progress | None = None) -> TeacherCard:
    """Adapt the teacher and write ``cache/teacher/``: the card, and what was trained.

    Same seed, same machine and same number of torch threads give the same bytes on a CPU.

    Raises:
        ConfigError: this teacher cannot follow ``sam.prompt``. StageError: no partition yet.
        LockedStoreError: another process fine-tunes into this cache.
    """
    check_prompt(config)
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    with writer_lock(cache / "locks" / "teacher.lock"), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return _finetune(config, partition, progress)


@dataclass
class _Trained:
    """A SAM ready to label, and what of it goes to disk."""

    sam: Sam
    lora_rank: int | None = None
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # file -> its tensors
    parameters: int = 0  # trained
    prompter: Prompter | None = None


def _finetune(config: Config, partition: Partition, progress: Progress | None) -> TeacherCard:
    train = _adapt if config.sam.prompt == "none" else _prepare_prompt
    trained = train(config, partition, progress)
    folder = config.cache.root / "teacher"
    with folder_beside(folder) as building:
        for name, tensors in trained.files.items():
            content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            safetensors.torch.save_file(content, building / name)
        card = _card(config, partition, trained, building)
        if trained.lora_rank is not None:
            merge_lora(trained.sam.image_encoder)
        teacher = Teacher(
            trained.sam,
            card,
            device=config.sam.device,
            precision="fp32",
            prompter=trained.prompter,
        )
        dice = _mean_dice(teacher, load_labelled(config, partition, partition.server.calibration))
        card = card.model_copy(update={"calibration_dice": dice})
        write_json(building / CARD_FILE, card.model_dump())
    return card


def _card(config: Config, partition: Partition, trained: _Trained, folder: Path) -> TeacherCard:
    """The card of what lies in ``folder``, its Dice not measured yet."""
    sha256 = {name: file_sha256(folder / name) for name in trained.files}
    return TeacherCard(
        variant=config.sam.variant,
        input_size=trained.sam.image_encoder.img_size,
        num_classes=config.data.num_classes,
        prompt=config.sam.prompt_policy,
        lora_rank=trained.lora_rank,
        base_sha256=base_checkpoint(config.sam)[1],
        adapter_sha256=sha256.get(ADAPTER_FILE, "none"),
        coarse_sha256=sha256.get(COARSE_FILE),
        parameters=sum(parameter.numel() for parameter in trained.sam.parameters()),
        trained_parameters=trained.parameters,
        server_sha256=partition.server_sha256(),
        train_images=len(partition.server.train),
        calibration_images=len(partition.server.calibration),
        calibration_dice=0.0,
        seed=config.seed,
    )


def _adapt(config: Config, partition: Partition, progress: Progress | None) -> _Trained:
    """The prompt-free teacher, its adapter not merged yet."""
    sam = build_base(config.sam, num_classes=config.data.num_classes)
    rank = None if config.sam.variant.startswith("timm:") else config.sam.lora_rank
    if rank is not None:
        add_lora(sam.image_encoder, rank)
        sam.prompt_encoder.requires_grad_(False)
        sam.prompt_encoder.no_mask_embed.requires_grad_(True)
    names = [name for name, parameter in sam.named_parameters() if parameter.requires_grad]
    side = sam.image_encoder.img_size
    pixels, masks = _frames(load_labelled(config, partition, partition.server.train), side)

    def loss(chosen: Tensor, generator: torch.Generator) -> Tensor:
        return _loss(sam, pixels[chosen], masks[chosen], config.sam, generator)

    sam.to(resolve_device(config.sam.device))
    _train(sam, _optimizer(sam, config.sam), loss, len(pixels), config, progress)
    # what fine-tuning changed: the trained parameters, and the buffers of a backbone trained whole
    state = sam.state_dict()
    changed = {name: state[name] for name in (names if rank is not None else state)}
    count = sum(state[name].numel() for name in names)
    return _Trained(sam, rank, {ADAPTER_FILE: changed}, count)


def _prepare_prompt(config: Config, partition: Partition, progress: Progress | None) -> _Trained:
    """SAM as it comes and what prompts it; for ``box``, a coarse model trained now."""
    sam = build_base(config.sam, num_classes=MULTIMASK)
    if config.sam.prompt == "points":
        return _Trained(sam, prompter=PointGrid(config.sam.points_per_side))
    items = load_labelled(config, partition, partition.server.train)
    pixels, masks = _frames(items, COARSE_SIDE)
    device = resolve_device(config.sam.device)
    model = build_coarse(config).to(device)

    def loss(chosen: Tensor, generator: torch.Generator) -> Tensor:
        images, target = _augment(pixels[chosen], masks[chosen], generator)
        logits = model(normalise(images.to(device) / 255))
        return supervised_loss(logits, target.to(device).long())

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.sam.learning_rate, weight_decay=config.sam.weight_decay
    )
    _train(model, optimizer, loss, len(pixels), config, progress)
    count = sum(parameter.numel() for parameter in model.parameters())
    files = {COARSE_FILE: model.state_dict()}
    return _Trained(sam, files=files, parameters=count, prompter=CoarseBox(model))


def _mean_dice(teacher: Teacher, images: Iterable[LabelledImage]) -> float:
    """Mean foreground Dice per image, at the images' own size."""
    predicted_iou = []
    for item in images:
        probabilities, _ = teacher.probabilities([item.image], item.mask.shape)
        predicted = probabilities[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        predicted_iou.append(dice_score(predicted, item.mask, num_classes=teacher.card.num_classes))
    return float(np.mean(predicted_iou))


def _frames(items: Iterable[LabelledImage], size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) uint8 and masks (N, S, S) uint8 in the input frame; padding = IGNORE."""
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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    config: Config,
    progress: Progress | None,
) -> None:
    """Train ``model`` in place; the last, smaller batch of an epoch is filled from its start.

    Args:
        loss_of: the loss of a batch, given its indices below ``count``.
    """
    settings = config.sam
    model.train()
    generator = torch.Generator().manual_seed(config.seed)
    batch = min(settings.batch_size, count)
    per_epoch = -(-count // batch)
    total = per_epoch * settings.epochs
    warmup = max(1, round(settings.warmup_fraction * total))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return float((1 - (step - warmup) / max(1, total - warmup)) ** settings.decay_power)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator)
            order = torch.cat([order, order])[: per_epoch * batch]
        chosen = order[(step % per_epoch) * batch :][:batch]
        optimizer.zero_grad()
        loss_of(chosen, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("fine-tuning the teacher", step + 1, total)
    model.eval()


def _augment(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random view of frames: images (B, 3, S, S) float in 0..255, masks (B, S, S) uint8."""
    maps = random_affine(len(pixels), Geometry(), generator)
    images = warp_images(pixels.float() / 255, sampling_grid(maps, pixels), padding="zeros")
    target = warp_labels(masks, sampling_grid(maps, masks), padding="zeros", fill=IGNORE)
    return change_appearance(images, HEAVY, generator) * 255, target


def _loss(
    sam: Sam, pixels: Tensor, masks: Tensor, settings: SamConfig, generator: torch.Generator
) -> Tensor:
    """Loss of one augmented batch: 0.2 CE + 0.8 Dice, and the IoU head's squared error."""
    images, target = _augment(pixels, masks, generator)
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
