"""int8 makes labels only where its masks are those of fp32, which is measured once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.partition import ServerPart
from pipeline.errors import ConfigError
from pipeline.labelling import fidelity
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.labelling.fidelity import check_fidelity, mask_iou
from pipeline.labelling.job import Job, load_job
from pipeline.labelling.precompute import precompute
from pipeline.sam.teacher import load_teacher
from pipeline.stores.label_store import LabelStore
from pipeline.stores.pseudo_labels import PseudoLabels


def asking(config: Config, precision: str, **others: str) -> Config:
    run = config.precompute.model_copy(update={"precision": precision, **others})
    return config.model_copy(update={"precompute": run})


@pytest.fixture
def job(adapted: Config) -> Job:
    """Labels in int8 are asked for."""
    return load_job(asking(adapted, "int8"))


class Changed(MemoryAwareTeacher):
    """The teacher in fp32, whose masks are then changed; counts the images that it is given."""

    def __init__(self, job: Job, change: str = "") -> None:
        exact = asking(job.config, "fp32", residual="fp32")
        super().__init__(load_teacher(exact, job.partition), batch_size=8)
        self.change, self.images = change, 0

    def label(self, images: Sequence[NDArray[np.uint8]], size: int) -> PseudoLabels:
        self.images += len(images)
        labels = super().label(images, size)
        if self.change == "all foreground":
            labels.masks[:] = 1
        return labels


def test_iou_by_hand() -> None:
    """Of five pixels that either calls foreground, three are of one class."""
    found = np.array([[[1, 1, 2, 0, 0], [1, 0, 0, 0, 2]]], np.uint8)
    truth = np.array([[[1, 1, 1, 0, 0], [0, 0, 0, 0, 2]]], np.uint8)
    assert mask_iou(found, truth) == 3 / 5
    assert mask_iou(found * 0, truth * 0) == 1


def test_equal_masks_pass_and_are_measured_once(job: Job) -> None:
    teacher = Changed(job)
    check_fidelity(job, teacher)
    assert teacher.images == len(job.partition.server.calibration)
    check_fidelity(job, teacher)
    assert teacher.images == len(job.partition.server.calibration)
    other = dataclasses.replace(job, identity=job.identity.model_copy(update={"label_size": 48}))
    check_fidelity(other, teacher)
    assert teacher.images == 2 * len(job.partition.server.calibration)


def test_moved_masks_are_refused_with_the_number(job: Job) -> None:
    teacher = Changed(job, "all foreground")
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            check_fidelity(job, teacher)
        assert teacher.images == len(job.partition.server.calibration)
    message = str(caught.value)
    assert message.startswith("precompute.precision: int8 moves this teacher's masks: IoU with ")
    number = float(message.split(" is ")[1].split(" on ")[0])
    assert 0 <= number < fidelity.MIN_IOU
    assert message.endswith(
        f"on D_p's calibration part ({teacher.images}), expected 0.99 or more; use "
        "precompute.precision=auto"
    )


def test_a_site_measures_its_own_first_images(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "IMAGES", 4)
    alone = job.partition.model_copy(update={"server": ServerPart()})
    teacher = Changed(job, "all foreground")
    with pytest.raises(ConfigError, match=r"on the first images \(4\), expected"):
        check_fidelity(dataclasses.replace(job, partition=alone), teacher)
    assert teacher.images == 4


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_other_precisions_are_not_measured(adapted: Config, precision: str) -> None:
    job = load_job(asking(adapted, precision))
    teacher = Changed(job, "all foreground")
    check_fidelity(job, teacher)
    assert teacher.images == 0


def test_a_narrow_residual_stream_is_measured_too(adapted: Config) -> None:
    job = load_job(asking(adapted, "bf16", residual="bf16"))
    check_fidelity(job, Changed(job))
    with pytest.raises(ConfigError) as caught:
        check_fidelity(
            dataclasses.replace(job, identity=job.identity.model_copy(update={"label_size": 48})),
            Changed(job, "all foreground"),
        )
    message = str(caught.value)
    assert message.startswith("precompute.residual: bf16 moves this teacher's masks: IoU with ")
    assert message.endswith("expected 0.99 or more; use precompute.residual=fp32")


def test_labels_in_int8(adapted: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have an identity of their own; how near they are depends on the CPU (``test_int8``)."""
    able: dict[str, Any] = torch.cpu.get_capabilities() | {"avx512_vnni": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(fidelity, "MIN_IOU", 0.0)
    result = precompute(asking(adapted, "int8"))
    assert result.failed == []
    store = LabelStore(adapted.cache.root / "sam" / "server.zarr")
    assert store.identity.precision == "int8"
    assert {made_by["precision"] for made_by in store.provenance()[0]} == {"int8"}
