"""``samfed finetune-sam``: adapt the teacher to the server's labelled set (the SAMed recipe).

Zhang & Liu, "Customized Segment Anything Model for Medical Image Segmentation", 2023: LoRA on the
query and value of every encoder block, the mask decoder and the default prompt embedding trained,
no prompts, 0.2 CE + 0.8 Dice on the low-resolution logits, AdamW, warm-up and polynomial decay.
A ``timm:`` teacher is trained whole. The IoU head learns the real IoU by mean squared error.
Under ``sam.prompt`` SAM stays as it comes: nothing is adapted.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from segment_anything.modeling import Sam

from pipeline.config import Config
from pipeline.data.images import load_labelled
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import file_sha256, write_bytes, write_json, writer_lock
from pipeline.errors import DataError, NotFiniteError
from pipeline.folders import discard, folder_beside
from pipeline.progress import Progress
from pipeline.runtime import resolve_device, torch_threads
from pipeline.sam.checkpoints import base_checkpoint, build_base, note_unofficial
from pipeline.sam.frame import frame_patch
from pipeline.sam.lora import add_adapter, merge_lora
from pipeline.sam.prompts import MULTIMASK, PointGrid, check_prompt
from pipeline.sam.teacher import ADAPTER_FILE, Teacher
from pipeline.sam.training import Training, TrainingState, diverged, input_frames
from pipeline.segmentation.metrics import dice_score
from pipeline.stores.arrays import canonical_json
from pipeline.stores.plain_data import State, load, save
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard

log = logging.getLogger("samfed.sam.finetune")

#: Of an unfinished training, below the cache.
CHECKPOINT = Path("finetune") / "checkpoint.safetensors"
#: A checkpoint of another version is not continued; raise it with anything that changes training.
_TRAINING_VERSION = 2


def finetune(config: Config, *, progress: Progress | None = None) -> TeacherCard:
    """Adapt the teacher and write ``cache/teacher/``: the card, and what was trained.

    Same seed, same machine and same ``sam.threads`` give the same bytes on a CPU. A training that
    was stopped goes on after its last finished epoch, to the same bytes.

    Raises:
        ConfigError: this teacher cannot follow ``sam.prompt``. StageError: no partition yet.
        LockedStoreError: another process fine-tunes into this cache. NotFiniteError: the training
        diverged; the teacher that was there stays.
    """
    check_prompt(config)
    note_unofficial(config.sam)
    cache = config.cache.root
    partition = load_partition(cache / "partition.json", with_public=True)
    folder = cache / CHECKPOINT.parent
    with writer_lock(cache / "locks" / "teacher.lock"), torch_threads(config.sam.threads):
        try:
            card = _finetune(config, partition, progress)
        except NotFiniteError:  # what led there is of no use
            _forget(folder)
            raise
        _forget(folder)
    return card


def _finetune(config: Config, partition: Partition, progress: Progress | None) -> TeacherCard:
    _check_foreground(config, partition)
    cache = config.cache.root
    checkpoint = cache / CHECKPOINT
    teacher, adapter = make_teacher(config, partition, checkpoint=checkpoint, progress=progress)
    measured: dict[str, object] = {"calibration_dice": _mean_dice(teacher, config, partition)}
    with folder_beside(cache / "teacher") as folder:
        if adapter:
            write_bytes(folder / ADAPTER_FILE, safetensors.torch.save(adapter))
            measured["adapter_sha256"] = file_sha256(folder / ADAPTER_FILE)
        card = teacher.card.model_copy(update=measured)
        write_json(folder / CARD_FILE, card.as_json())
    return card


def _check_foreground(config: Config, partition: Partition) -> None:
    """Refuse a part of D_p from which nothing is learnt, or on which every Dice is 1."""
    for part, ids in partition.splits("server").items():
        if not any(item.mask.any() for item in load_labelled(config, partition, ids)):
            raise DataError(
                f"the server's {part} part: none of its {len(ids)} masks has any foreground; look "
                "at what `samfed prepare` says of the masks, or draw other images "
                "(partition.server_images, seed)"
            )


def _forget(folder: Path) -> None:
    if folder.exists():
        discard(folder)


def make_teacher(
    config: Config,
    partition: Partition,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Teacher, State]:
    """Train the teacher that the settings ask for; under a prompt, take SAM as it comes.

    Args:
        checkpoint: file to which each epoch is saved, and from which a training goes on.

    Returns:
        the teacher, whose card has neither its Dice nor its adapter's sha256 yet, and the adapter's
        tensors by name, none under a prompt.
    """
    adapter: State = {}
    prompter, device = None, config.sam.device
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.sam.prompt == "none":
            sam, adapter = _adapt(config, partition, checkpoint, progress)
        else:
            sam = build_base(config.sam, num_classes=MULTIMASK)
            prompter = PointGrid(config.sam.points_per_side)
    card = _card(config, partition, sam, adapter)
    merge_lora(sam)
    return Teacher(sam, card, device=device, precision="fp32", prompter=prompter), adapter


def _adapt(
    config: Config, partition: Partition, checkpoint: Path | None, progress: Progress | None
) -> tuple[Sam, State]:
    """Train a teacher; returns it, LoRA not merged, and what of its state was trained."""
    sam = build_base(config.sam, num_classes=config.data.num_classes)
    names = add_adapter(sam, config.sam.adapter_rank)
    items = load_labelled(config, partition, partition.server.train)
    frames = input_frames(items, sam.image_encoder.img_size, frame_patch(config.sam))
    sam.to(resolve_device(config.sam.device))
    training = Training(sam, names, config, fingerprint=_fingerprint(config, partition))
    if checkpoint is not None and checkpoint.is_file():
        state = load(checkpoint, TrainingState, stage="finetune-sam")
        if training.restore(state):
            log.info("going on after epoch %d of %d", state.epoch, config.sam.epochs)
        else:
            log.info("beginning anew: the training that was stopped had other settings or images")
    for epoch in training.epochs(frames, progress=progress):
        log.debug("epoch %d: loss %.4f", epoch.number, epoch.loss)
        if checkpoint is not None:
            save(checkpoint, training.state())
    return sam, training.weights()


def _fingerprint(config: Config, partition: Partition) -> str:
    """Return a sha256 over all that decides the result of a training."""
    settings = config.sam.model_dump(mode="json", exclude={"checkpoint"})
    decides = {
        "version": _TRAINING_VERSION,
        "settings": settings,
        "augment": config.augment.model_dump(mode="json"),
        "seed": config.seed,
        "num_classes": config.data.num_classes,
        "base": base_checkpoint(config.sam)[1],
        "server": partition.server_sha256(),
    }
    return hashlib.sha256(canonical_json(decides)).hexdigest()


def _card(config: Config, partition: Partition, sam: Sam, adapter: State) -> TeacherCard:
    buffers = dict(sam.named_buffers())
    trained = [value for name, value in adapter.items() if name not in buffers]
    return TeacherCard(
        variant=config.sam.variant,
        input_size=sam.image_encoder.img_size,
        num_classes=config.data.num_classes,
        prompt=config.sam.prompt_policy,
        frame=config.sam.frame,
        lora_rank=config.sam.adapter_rank,
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


def _mean_dice(teacher: Teacher, config: Config, partition: Partition) -> float:
    """Return the mean foreground Dice per calibration image, at the images' own size."""
    dice = []
    for item in load_labelled(config, partition, partition.server.calibration):
        probabilities, _ = teacher.probabilities([item.image], item.mask.shape)
        if not bool(probabilities.isfinite().all()):
            what = f"its probabilities for image '{item.image_id}' are not finite"
            raise diverged(config.sam, config.sam.epochs, what)
        predicted = probabilities[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        dice.append(dice_score(predicted, item.mask, num_classes=teacher.card.num_classes))
    return float(np.mean(dice))
