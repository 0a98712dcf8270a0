"""Whatever turns images into labels, and how its batches shrink when memory runs out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import NotFiniteError, SamfedError
from pipeline.stores.label_store import Provenance, PseudoLabels
from pipeline.stores.teacher_card import TeacherCard

log = logging.getLogger("samfed.precompute")

Image = NDArray[np.uint8]
# torch and ONNX Runtime each say it in their own way, on the CPU in words only
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Failed to allocate memory",
    "bad allocation",
)


class TeacherBackend(Protocol):
    """The teacher, in torch or in ONNX Runtime."""

    @property
    def card(self) -> TeacherCard:
        """What the teacher is."""
        ...

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        """Label (H, W, 3) uint8 images of any sizes, in the client's frame of ``size`` pixels."""
        ...

    def provenance(self) -> Provenance:
        """Return what computed this thread's last batch: backend, precision, device, versions."""
        ...


class MemoryAwareTeacher:
    """A teacher that halves its batches when memory runs out, and says so.

    The smaller size stays for the rest of the run and is recorded with every chunk that it was used
    for: kernels may round differently at another batch size. Threads that share it take turns, a
    batch at a time, and each is told the size of its own.
    """

    def __init__(self, teacher: TeacherBackend, batch_size: int) -> None:
        self._teacher = teacher
        self._limit = self._asked = batch_size
        self._turn = threading.Lock()
        self._last = threading.local()  # .limit of this thread's last batch

    @property
    def card(self) -> TeacherCard:
        """What the teacher is."""
        return self._teacher.card

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        """Label ``images`` in as many passes as memory asks for.

        Raises:
            SamfedError: memory does not suffice for one image. NotFiniteError: a label is NaN or
            infinite, as where numbers exceed float16.
        """
        with self._turn:
            while True:
                try:
                    parts = [
                        self._teacher.label(images[start : start + self._limit], size)
                        for start in range(0, len(images), self._limit)
                    ]
                    break
                except Exception as error:
                    if not _out_of_memory(error):
                        raise
                    self._back_off(error)
            self._last.limit = self._limit
        labels = join(parts)
        if not np.isfinite(labels.predicted_iou).all():
            precision = self._teacher.provenance().get("precision")
            raise NotFiniteError(
                f"the teacher's labels are not finite in {precision}; use "
                "precompute.precision=fp32, or run `samfed finetune-sam` at a lower rate"
            )
        return labels

    def provenance(self) -> Provenance:
        """Return the teacher's, with the batch size where it is not the one asked for."""
        record = self._teacher.provenance()
        limit = getattr(self._last, "limit", self._asked)
        return record if limit == self._asked else record | {"batch_size": str(limit)}

    def _back_off(self, error: Exception) -> None:
        if self._limit == 1:
            raise SamfedError(
                "memory does not suffice for one image; choose a smaller sam.variant or "
                "precompute.precision, or another precompute.device"
            ) from error
        self._limit = (self._limit + 1) // 2
        log.warning(
            "out of memory; going on with batches of %d (precompute.batch_size: %d)",
            self._limit,
            self._asked,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def join(parts: Sequence[PseudoLabels]) -> PseudoLabels:
    """Concatenate labels along their images."""
    return PseudoLabels(
        masks=np.concatenate([part.masks for part in parts]),
        confidences=np.concatenate([part.confidences for part in parts]),
        predicted_iou=np.concatenate([part.predicted_iou for part in parts]),
    )
