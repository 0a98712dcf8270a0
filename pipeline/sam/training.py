"""The optimisation behind ``samfed finetune-sam``: epochs of a teacher on its input frames.

After each epoch everything that the next one depends on is a ``TrainingState``, so that a training
which stops goes on to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.config import AugmentConfig, Config, SamConfig
from pipeline.data.images import LabelledImage
from pipeline.errors import NotFiniteError
from pipeline.progress import Progress
from pipeline.sam.frame import LOGIT_STRIDE, to_input_frame
from pipeline.sam.teacher import forward
from pipeline.segmentation.augmentation import (
    HEAVY,
    change_appearance,
    is_grey,
    random_affine,
    sampling_grid,
    warp_images,
    warp_labels,
)
from pipeline.segmentation.losses import IGNORE, supervised_loss
from pipeline.stores.plain_data import Plain, State, not_finite

_MAX_GRADIENT_NORM = 1.0  # usual for transformers


class LabelledFrame(NamedTuple):
    """An image (3, h, w) uint8 in its input frame, and its mask (h, w) uint8."""

    pixels: Tensor
    mask: Tensor


#: Images (b, 3, h, w) float in 0..255 and masks (b, h, w) uint8, augmented.
View = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Epoch:
    """Result of one pass over the training part."""

    number: int  # from 1
    loss: float  # mean over its batches


@dataclass(frozen=True)
class TrainingState(Plain):
    """Everything that the next epoch depends on."""

    fingerprint: str  # of all that decides the result
    epoch: int  # the last one that is finished
    weights: State  # those that change
    optimizer: dict[str, State]  # its moments, by the parameter's number
    random: State  # states of the generators that dropout draws from


class Training:
    """AdamW on a teacher, in place, an epoch at a time: warm-up, then polynomial decay."""

    def __init__(self, sam: Sam, names: Sequence[str], config: Config, *, fingerprint: str) -> None:
        """Prepare to train what has a gradient in ``sam``.

        Args:
            names: of what changes in the state of ``sam``. fingerprint: of all that decides the
                result; only a state with the same one can be restored.
        """
        self._sam, self._names, self._config = sam, names, config
        self._fingerprint = fingerprint
        self._optimizer = _optimizer(sam, config.sam)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._done = 0  # epochs

    def state(self) -> TrainingState:
        """Return what ``restore`` needs to go on from here."""
        moments = self._optimizer.state_dict()["state"]
        random = {"cpu": torch.get_rng_state()}
        if self._sam.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._sam.device)
        return TrainingState(
            fingerprint=self._fingerprint,
            epoch=self._done,
            weights=self.weights(),
            optimizer={str(n): {k: v.cpu() for k, v in of.items()} for n, of in moments.items()},
            random=random,
        )

    def restore(self, state: TrainingState) -> bool:
        """Go on after ``state``; returns False, and does nothing, if it is of another training."""
        if state.fingerprint != self._fingerprint:
            return False
        self._sam.load_state_dict(state.weights, strict=False)  # what is frozen is not in it
        moments = {int(number): of for number, of in state.optimizer.items()}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(state.random["cpu"])
        if "cuda" in state.random:
            torch.cuda.set_rng_state(state.random["cuda"], self._sam.device)
        self._done = state.epoch
        return True

    def weights(self) -> State:
        """Return what training changes, on the CPU."""
        state = self._sam.state_dict()
        return {name: state[name].cpu().contiguous() for name in self._names}

    def epochs(
        self, frames: Sequence[LabelledFrame], *, progress: Progress | None = None
    ) -> Iterator[Epoch]:
        """Train, and yield each epoch that is finished.

        The last, smaller batch of an epoch is filled from its start.

        Raises:
            NotFiniteError: the loss or the weights have become NaN or infinite.
        """
        settings, count = self._config.sam, len(frames)
        batch = min(settings.batch_size, count)
        per_epoch = -(-count // batch)
        steps = per_epoch * settings.epochs
        self._sam.train()
        for epoch in range(self._done, settings.epochs):
            # a stream for each epoch, so that none has to be kept
            words = np.random.SeedSequence(self._config.seed, spawn_key=(epoch,))
            rng = np.random.default_rng(words)
            order = torch.from_numpy(rng.permutation(count))
            batches = torch.cat([order, order])[: per_epoch * batch].split(batch)
            total = torch.zeros(())
            for step, chosen in enumerate(batches, start=epoch * per_epoch):
                factor = learning_rate_factor(settings, step, steps)
                drawn = [frames[place] for place in chosen]
                views = _augment(drawn, rng, settings=self._config.augment)
                loss = self._step(views, factor)
                if not bool(loss.isfinite()):
                    raise diverged(settings, epoch + 1, f"the loss is {float(loss)}")
                total = total + loss
                if progress is not None:
                    progress("fine-tuning the teacher", step + 1, steps)
            fault = not_finite(self.weights())
            if fault is not None:
                raise diverged(settings, epoch + 1, fault)
            self._done = epoch + 1
            yield Epoch(self._done, float(total) / per_epoch)

    def _step(self, views: Iterable[View], factor: float) -> Tensor:
        """Take a step on an augmented batch at ``factor`` times the rates; return its loss."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad()
        loss = _loss(self._sam, views, settings=self._config.sam)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._sam.parameters(), _MAX_GRADIENT_NORM)
        self._optimizer.step()
        return loss.detach().cpu()


def diverged(settings: SamConfig, epoch: int, what: str) -> NotFiniteError:
    """Return the error of a training that broke in ``epoch`` (from 1): ``what`` is not finite."""
    own = settings.variant.startswith("timm:")
    keys = ["learning_rate", "encoder_learning_rate"] if own else ["learning_rate"]
    rates = " and ".join(f"sam.{key} {getattr(settings, key):g}" for key in keys)
    return NotFiniteError(
        f"the teacher diverged in epoch {epoch} of {settings.epochs}: {what}; lower {rates}"
    )


def learning_rate_factor(settings: SamConfig, step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear rise, then a polynomial fall."""
    warmup = max(1, round(settings.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    return float((1 - (step - warmup) / max(1, steps - warmup)) ** settings.decay_power)


def _optimizer(sam: Sam, settings: SamConfig) -> torch.optim.AdamW:
    """Return AdamW over all that is trained; a timm backbone has a learning rate of its own."""
    backbone = getattr(sam.image_encoder, "backbone", None)
    inside = {} if backbone is None else {id(p): p for p in backbone.parameters()}
    rest = [p for p in sam.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": rest, "lr": settings.learning_rate}]
    if inside:
        groups.append({"params": list(inside.values()), "lr": settings.encoder_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def _augment(
    batch: Sequence[LabelledFrame], rng: np.random.Generator, *, settings: AugmentConfig
) -> Iterator[View]:
    """Draw a random view of each frame; yield those of one shape together.

    A frame that is not square lies on its side after an odd number of quarter turns.
    """
    views: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
    maps = random_affine(len(batch), rng, settings=settings)
    for (pixels, mask), drawn in zip(batch, maps, strict=True):
        turned = bool(drawn[0, 0].abs() < drawn[0, 1].abs())
        grid = upright_grid(drawn, mask.shape, mask.T.shape if turned else mask.shape)
        image = warp_images(pixels[None].float().div_(255), grid, padding="zeros")
        target = warp_labels(mask[None], grid, padding="zeros", fill=IGNORE)
        views.setdefault(target.shape, []).append((image, target, is_grey(pixels[None])))
    for alike in views.values():
        images, targets, grey = (torch.cat(part) for part in zip(*alike, strict=True))
        yield change_appearance(images, HEAVY, rng, grey=grey).mul_(255), targets


def upright_grid(drawn: Tensor, from_hw: Sequence[int], to_hw: Sequence[int]) -> Tensor:
    """Return a ``sampling_grid`` of one image that keeps angles where sides differ: (1, h, w, 2).

    Args:
        drawn: (2, 3), a map of ``random_affine``, in the square's coordinates -1..1.
        from_hw: height and width of the image. to_hw: of the view, in pixels of the same size.
    """
    sides = drawn.new_tensor([to_hw[1], to_hw[0], 1]) / drawn.new_tensor(from_hw[::-1])[:, None]
    sides[:, 2] = 1  # a shift is relative to the image
    return sampling_grid((drawn * sides)[None], drawn.new_empty((1, *to_hw)))


def _loss(sam: Sam, views: Iterable[View], *, settings: SamConfig) -> Tensor:
    """Return the loss of one augmented batch: 0.2 CE + 0.8 Dice, and the IoU head's error."""
    parts = []
    for images, target in views:
        images, target = images.to(sam.device), target.to(sam.device).long()
        logits, iou = forward(sam, images, target != IGNORE)
        # the cell's centre decides its class; interpolation would invent classes
        low = target[:, LOGIT_STRIDE // 2 :: LOGIT_STRIDE, LOGIT_STRIDE // 2 :: LOGIT_STRIDE]
        parts.append((logits, low, iou))
    logits, low, iou = _side_by_side(parts)
    # supervised_loss weighs CE and Dice 2(1-a) and 2a
    loss = supervised_loss(logits, low, dice_weight=settings.dice_weight) / 2
    return loss + F.mse_loss(iou, real_iou(logits.detach(), low))


def _side_by_side(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Join logits, targets and IoU estimates of several shapes; what is added is ignored."""
    shapes = [low.shape[1:] for _, low, _ in parts]
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    joined = []
    for logits, low, iou in parts:
        missing = (0, width - low.shape[2], 0, height - low.shape[1])
        joined.append((F.pad(logits, missing), F.pad(low, missing, value=IGNORE), iou))
    return tuple(torch.cat(part) for part in zip(*joined, strict=True))


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


def input_frames(
    items: Iterable[LabelledImage], size: int, patch: int | None = None
) -> list[LabelledFrame]:
    """Put images and masks into the input frame; in a mask, padding is IGNORE.

    Args:
        patch: as ``frame_hw``'s.
    """
    frames = []
    for item in items:  # one at a time: originals may be large
        pixels, valid_hw = to_input_frame([item.image], size, patch)
        height, width = valid_hw[0].tolist()
        resized = Image.fromarray(item.mask).resize((width, height), Image.Resampling.NEAREST)
        mask = np.full(pixels.shape[-2:], IGNORE, np.uint8)
        mask[:height, :width] = np.asarray(resized)
        frames.append(LabelledFrame(pixels[0], torch.from_numpy(mask)))
    return frames
