"""Whatever turns images into labels, and how its batches shrink when memory runs out."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from pipeline.errors import NotFiniteError, SamfedError
from pipeline.sam.device import Image, Pending
from pipeline.stores.label_store import Provenance
from pipeline.stores.pseudo_labels import PseudoLabels, join
from pipeline.stores.teacher_card import TeacherCard

log = logging.getLogger("samfed.precompute")

# torch, ONNX Runtime and CUDA's libraries each say it in their own way, on the CPU in words only
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|out of memory|Failed to allocate memory|bad allocation"
    r"|CU\w+_STATUS_\w*ALLOC\w*_FAILED"  # cuBLAS, cuDNN and others take memory beside torch's
)


class TeacherBackend(Protocol):
    """The teacher, in torch or in ONNX Runtime."""

    @property
    def card(self) -> TeacherCard:
        """What the teacher is."""
        ...

    def staged(self, image: Image) -> Image:
        """Prepare a (H, W, 3) uint8 image for ``begin``, ahead of it and in any thread."""
        ...

    def begin(self, images: Sequence[Image], size: int) -> Pending:
        """Begin to label images of any sizes, in the client's frame of ``size`` pixels."""
        ...

    def provenance(self) -> Provenance:
        """Return what computes this thread's last batch: backend, precision, device, versions."""
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

    def staged(self, image: Image) -> Image:
        """Prepare an image as the teacher does."""
        return self._teacher.staged(image)

    def begin(self, images: Sequence[Image], size: int) -> Pending:
        """Begin to label ``images`` in as many passes as memory asks for.

        Raises:
            SamfedError: memory does not suffice for one image.
        """
        with self._turn:
            while (parts := self._passes(images, size)) is None:
                self._back_off()
            self._last.limit = self._limit
            return _Passes(parts, self._teacher.provenance().get("precision"))

    def label(self, images: Sequence[Image], size: int) -> PseudoLabels:
        """Label images as ``begin`` does, and wait for it; raises what that and its result do."""
        return self.begin(images, size).result()

    def _passes(self, images: Sequence[Image], size: int) -> list[Pending] | None:
        """Return what is begun, or None where memory ran out and smaller batches may do."""
        try:
            return [
                self._teacher.begin(images[start : start + self._limit], size)
                for start in range(0, len(images), self._limit)
            ]
        except Exception as error:
            if not _out_of_memory(error):
                raise
            if self._limit == 1:
                raise SamfedError(
                    "memory does not suffice for one image; choose a smaller sam.variant or "
                    "precompute.precision, or another precompute.device"
                ) from error
        # by now the error is gone, and with its traceback what the failed batch holds
        return None

    def provenance(self) -> Provenance:
        """Return the teacher's, with the batch size where it is not the one asked for."""
        record = self._teacher.provenance()
        limit = getattr(self._last, "limit", self._asked)
        return record if limit == self._asked else record | {"batch_size": str(limit)}

    def _back_off(self) -> None:
        self._limit = (self._limit + 1) // 2
        log.warning(
            "out of memory; going on with batches of %d (precompute.batch_size: %d)",
            self._limit,
            self._asked,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Passes:
    """Labels of a batch that is labelled in several passes."""

    def __init__(self, parts: Sequence[Pending], precision: str | None) -> None:
        self._parts, self._precision = parts, precision

    def done(self) -> bool:
        return all(part.done() for part in self._parts)

    def result(self) -> PseudoLabels:
        """Return the labels of all passes.

        Raises:
            NotFiniteError: a label is NaN or infinite, as where numbers exceed float16.
        """
        labels = join([part.result() for part in self._parts])
        if not np.isfinite(labels.predicted_iou).all():
            raise NotFiniteError(
                f"the teacher's labels are not finite in {self._precision}; use "
                "precompute.precision=fp32, or run `samfed finetune-sam` at a lower rate"
            )
        return labels


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return _OUT_OF_MEMORY.search(str(error)) is not None
