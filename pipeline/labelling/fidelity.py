"""Whether less exact arithmetic keeps a teacher's masks: measured before labels are made with it.

Needs no truth: the masks are compared with those of the same teacher in float32.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import load_image
from pipeline.disk import read_json, write_json
from pipeline.errors import ConfigError
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.labelling.job import Job
from pipeline.sam.device import Image
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.teacher import load_teacher

log = logging.getLogger("samfed.precompute")

MIN_IOU = 0.99  # of the masks with those in float32
CALIBRATION = "D_p's calibration part"
IMAGES = 16  # of a site that has no calibration part; D_p's counts whole


@dataclass(frozen=True)
class _Gated:
    """A setting that is refused where it moves masks."""

    key: str
    value: str
    otherwise: str  # what to set instead

    def __str__(self) -> str:
        return self.value if self.key == "precision" else f"{self.key} {self.value}"


_GATED = (_Gated("precision", "int8", "auto"), _Gated("residual", "bf16", "fp32"))
_EXACTLY = {"precision": "fp32", "residual": "fp32", "compile": False, "attention": "auto"}


def check_fidelity(job: Job, teacher: MemoryAwareTeacher) -> None:
    """Refuse int8, and a residual stream in bf16, where masks are not float32's; others pass.

    Measured on D_p's calibration part, or at a site without one on its first images, and noted in
    ``cache/sam/int8.json`` or ``residual-bf16.json``, so that it takes its time once for a teacher.

    Raises:
        ConfigError: the masks' IoU is below ``MIN_IOU``.
    """
    run = job.config.precompute
    for gated in _GATED if run.backend == "torch" else ():
        if getattr(run, gated.key) == gated.value:
            _check(job, teacher, gated)


def _check(job: Job, teacher: MemoryAwareTeacher, gated: _Gated) -> None:
    server = job.partition.server.calibration
    ids = server or tuple(i for part in job.partition.clients.values() for i in part.train)[:IMAGES]
    where = f"{CALIBRATION if server else 'the first images'} ({len(ids)})"
    iou = _noted_iou(job, teacher, ids, f"comparing {gated} with fp32 on {where}", gated)
    if iou < MIN_IOU:
        raise ConfigError(
            f"precompute.{gated.key}: {gated.value} moves this teacher's masks: IoU with fp32's is "
            f"{iou:.4f} on {where}, expected {MIN_IOU} or more; use "
            f"precompute.{gated.key}={gated.otherwise}"
        )


def _noted_iou(
    job: Job, teacher: MemoryAwareTeacher, ids: tuple[str, ...], doing: str, gated: _Gated
) -> float:
    """Return the IoU of these images, as it was noted for this teacher or measured now."""
    path = job.config.cache.root / "sam" / f"{str(gated).replace(' ', '-')}.json"
    sha256 = [job.partition.images[image_id].image_sha256 for image_id in ids]
    key = {
        "identity": job.identity.digest,
        "images_sha256": hashlib.sha256("".join(sha256).encode()).hexdigest(),
    }
    noted = read_json(path, stage="precompute-sam") if path.is_file() else {}
    if noted.items() >= key.items():
        return float(noted["mask_iou"])
    log.info("%s, once for this teacher", doing)
    iou = _measure(job, teacher, ids)
    write_json(path, key | {"mask_iou": iou})
    log.info("IoU of %s masks with fp32's: %.4f", gated, iou)
    return iou


def _measure(job: Job, teacher: MemoryAwareTeacher, ids: Sequence[str]) -> float:
    run, size = job.config.precompute, job.identity.label_size
    config = job.config.model_copy(update={"precompute": run.model_copy(update=_EXACTLY)})
    exact = MemoryAwareTeacher(load_teacher(config, job.partition), run.batch_size)
    masks, expected = [], []
    for start in range(0, len(ids), run.batch_size):
        images = [_image(job, image_id) for image_id in ids[start : start + run.batch_size]]
        masks.append(teacher.label(images, size).masks)
        expected.append(exact.label(images, size).masks)
    return mask_iou(np.concatenate(masks), np.concatenate(expected))


def _image(job: Job, image_id: str) -> Image:
    """Return an image at the teacher's size."""
    entry = job.partition.images[image_id]
    image = load_image(job.config.data.root, entry.image, sha256=entry.image_sha256)
    return fit_longest_side(image, job.identity.input_size)


def mask_iou(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Return the IoU of two stacks of masks over all foreground pixels; 1 where there are none.

    Args:
        found, expected: class indices (N, S, S) uint8; a pixel of another class counts as missed.
    """
    either = ((found > 0) | (expected > 0)).sum()
    both = ((found == expected) & (expected > 0)).sum()
    return float(both / either) if either else 1.0
