"""Between the host and the teacher's device: images in and labels out, neither waited for.

On a GPU images are decoded into page-locked memory and copied on a stream of their own, while the
batch before is computed, and labels are fetched when they are there. On the CPU every step is over
when its call returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.sam.frame import fit_longest_side, fitted_hw, frame_hw, to_input_frame
from pipeline.stores.pseudo_labels import PseudoLabels

Image = NDArray[np.uint8]


class Pending(Protocol):
    """Labels of a batch that may still be computed."""

    def done(self) -> bool:
        """Tell whether ``result`` would return at once."""
        ...

    def result(self) -> PseudoLabels:
        """Wait for the labels and return them."""
        ...


class Finished:
    """Labels that are there."""

    def __init__(self, labels: PseudoLabels) -> None:
        self._labels = labels

    def done(self) -> bool:
        """Return True."""
        return True

    def result(self) -> PseudoLabels:
        """Return the labels."""
        return self._labels


class Download:
    """Labels on their way from the device, where what makes them may still be running."""

    def __init__(self, tensors: Mapping[str, Tensor], images: Sequence[Image]) -> None:
        """Begin to copy a batch's labels to the host.

        Args:
            tensors: by the names that ``PseudoLabels`` gives them, all on one device.
            images: what they come from; kept until the copy is over, so that page-locked memory is
                not used again while the device may still read it.
        """
        self._images = images
        # with non_blocking torch copies into page-locked memory; on the CPU this is no copy at all
        self._host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        self._copied: torch.cuda.Event | None = None
        device = tensors["masks"].device
        if device.type == "cuda":
            self._copied = torch.cuda.Event(blocking=True)  # waiting leaves the core to readers
            self._copied.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        """Tell whether the labels are on the host."""
        return self._copied is None or self._copied.query()

    def result(self) -> PseudoLabels:
        """Wait for the labels and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return PseudoLabels(**{name: tensor.numpy() for name, tensor in self._host.items()})


def page_locked(image: Image) -> Image:
    """Copy (H, W, 3) uint8 into memory from which a GPU copies by itself."""
    staged: Image = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True).numpy()
    staged[...] = image
    return staged


class Upload:
    """Copies batches to the teacher's device, on a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(
        self, images: Sequence[Image], size: int, patch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what ``to_input_frame`` returns, on the device; work there waits for the copy."""
        if self._stream is None:
            pixels, valid_hw = to_input_frame(images, size, patch)
            return pixels.to(self._device), valid_hw.to(self._device)
        with torch.cuda.stream(self._stream):
            shape = (len(images), *frame_hw(fitted_hw(images[0], size), size, patch), 3)
            batch = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            sizes = []
            for image, place in zip(images, batch, strict=True):
                fitted = np.require(fit_longest_side(image, size), requirements=["C", "W"])
                height, width = fitted.shape[:2]
                place[:height, :width].copy_(torch.from_numpy(fitted), non_blocking=True)
                sizes.append((height, width))
            valid_hw = torch.tensor(sizes, pin_memory=True).to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in (batch, valid_hw):  # made on one stream, used and freed on another
            tensor.record_stream(computing)
        return batch.permute(0, 3, 1, 2), valid_hw


@contextmanager
def plain_float32() -> Iterator[None]:
    """Compute float32 as float32 on a GPU too: cuDNN's convolutions would take TF32 for it."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
