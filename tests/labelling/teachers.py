"""Stand-ins for the teacher, whose labels follow from an image's pixels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import distributed
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.cluster import Cluster, Workers
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.disk import write_json
from pipeline.labelling.precompute import StageOneResult, precompute
from pipeline.sam.device import Finished, Pending
from pipeline.sam.frame import fit_longest_side
from pipeline.stores.label_store import LabelStore
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import TeacherCard

Images = Sequence[NDArray[np.uint8]]


def make_card(**changes: object) -> TeacherCard:
    """Return the card of a fake teacher of one class."""
    return TeacherCard(
        variant="fake",
        input_size=64,
        num_classes=1,
        prompt="none",
        lora_rank=2,
        base_sha256="b" * 64,
        adapter_sha256="a" * 64,
        parameters=1,
        trained_parameters=1,
        server_sha256="5" * 64,
        train_images=1,
        calibration_images=1,
        calibration_dice=0.5,
        seed=0,
    ).model_copy(update=changes)


class FakeTeacher:
    """Labels by threshold; counts the batches and the images that it labelled."""

    def __init__(
        self, on_batch: Callable[[int], None] = lambda batch: None, *, backend: str = "fake"
    ) -> None:
        self.card = make_card()
        self.on_batch, self.backend = on_batch, backend
        self.batches = self.images = 0

    def provenance(self) -> dict[str, str]:
        return {"backend": self.backend}

    def staged(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return fit_longest_side(image, self.card.input_size)

    def begin(self, images: Images, size: int) -> Pending:
        return Finished(self.label(images, size))

    def label(self, images: Images, size: int) -> PseudoLabels:
        self.on_batch(self.batches)
        self.batches, self.images = self.batches + 1, self.images + len(images)
        small = np.stack([image[:size, :size] for image in images])
        return PseudoLabels(
            masks=(small[..., 0] > 127).astype(np.uint8),
            confidences=small[..., 1],
            predicted_iou=(small.mean((1, 2, 3)) / 255).astype(np.float32),
        )


class Hungry(FakeTeacher):
    """Holds so many images at once and no more; says so as ``error`` does."""

    def __init__(self, capacity: int, error: Exception) -> None:
        super().__init__()
        self.capacity, self.error = capacity, error

    def label(self, images: Images, size: int) -> PseudoLabels:
        if len(images) > self.capacity:
            raise self.error
        return super().label(images, size)


def stand_in(patch: pytest.MonkeyPatch, teacher: FakeTeacher, *, mirrors: bool = False) -> None:
    """Let stage one find ``teacher`` where it would load one.

    Without ``mirrors`` no image is labelled twice, so the images that the teacher counts are rows.
    """
    patch.setattr("pipeline.labelling.job.checked_card", lambda *args: teacher.card)
    patch.setattr("pipeline.labelling.worker.load_teacher", lambda *args: teacher)
    if not mirrors:
        patch.setattr("pipeline.labelling.precompute.flip_sample", lambda rows: set[int]())


def run(config: Config, teacher: FakeTeacher, *, mirrors: bool = False) -> StageOneResult:
    """Run stage one with this teacher."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, teacher, mirrors=mirrors)
        return precompute(config)


def on_workers(client: distributed.Client) -> Workers:
    """Return what labels on these workers."""
    return nullcontext(Cluster(client))


def teacher_of(config: Config, **changes: object) -> FakeTeacher:
    """Return a teacher whose card, with these changes, lies in the cache."""
    server = load_partition(config.cache.root / "partition.json").server_sha256()
    teacher = FakeTeacher()
    teacher.card = make_card(server_sha256=server, **changes)
    write_json(config.cache.root / "teacher" / "card.json", teacher.card.model_dump())
    return teacher


def write_noise(folder: Path, *, count: int, size: int) -> None:
    """Write ``count`` images of noise and their masks, by one threshold."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
        mask = (image[..., 0] > 127).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{i:03d}.png")


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def labelled_rows(config: Config) -> int:
    """Count the rows on disk with a done mark, over all stores."""
    stores = [LabelStore(path) for path in (config.cache.root / "sam").glob("[!.]*.zarr")]
    return sum(int(store.done().sum()) for store in stores)
