"""``samfed evaluate-sam``: the teacher where truth is known, beside SAM as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import load_labelled, resize_image, resize_mask
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import write_bytes, write_json
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.progress import Progress
from pipeline.results.pages import render
from pipeline.results.teacher_page import TeacherExample, render_evaluation
from pipeline.runtime import torch_threads
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.prompts import why_not_prompted
from pipeline.sam.teacher import Teacher, load_teacher, load_zero_shot
from pipeline.segmentation.metrics import image_metrics, summarise
from pipeline.stores.label_store import confidence_to_probability
from pipeline.stores.teacher_card import TeacherCard

TEACHERS = ("adapted", "points")
ECE_BINS = 15
EXAMPLES = 8  # images that the page shows

Mask = NDArray[np.uint8]


class Reliability:
    """How often pixels of a confidence are right, in 15 bins of equal width; additive."""

    def __init__(self) -> None:
        self.pixels, self.confidence, self.hits = np.zeros((3, ECE_BINS))  # sums by bin

    def add(self, confidence: NDArray[np.float32], hit: NDArray[np.bool_]) -> None:
        """Count pixels (n,): the probability of the predicted class, and whether it was right."""
        index = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
        self.pixels += np.bincount(index, minlength=ECE_BINS)
        self.confidence += np.bincount(index, weights=confidence, minlength=ECE_BINS)
        self.hits += np.bincount(index[hit], minlength=ECE_BINS)

    def error(self) -> float:
        """Return the expected calibration error (Naeini et al., 2015), 0..1.

        Mean over bins of |share of hits - mean confidence|, weighted by the bin's share of pixels.
        """
        return float(np.abs(self.hits - self.confidence).sum() / self.pixels.sum())

    def bins(self) -> dict[str, list[Any]]:
        """Return each bin's ``pixels``, mean ``confidence`` and ``accuracy`` (None where empty)."""
        sums = {"confidence": self.confidence, "accuracy": self.hits}
        means = {
            name: [float(s / n) if n else None for s, n in zip(values, self.pixels, strict=True)]
            for name, values in sums.items()
        }
        return {"pixels": self.pixels.astype(int).tolist(), **means}


@dataclass(frozen=True)
class TeacherEvaluation:
    """What ``evaluate_teacher`` measured.

    A teacher is JSON-ready: ``variant``, ``prompt``, Dice, IoU, HD95 and ASSD in the client's frame
    (``metrics.summarise``), ``ece`` and its bins (``reliability``), and ``empty``, the share of
    images with an empty mask; or, under ``missing``, why there is none.
    """

    configured: str  # the teacher that ``sam.prompt`` asks for
    teachers: dict[str, dict[str, Any]]  # each of ``TEACHERS``
    page: Path

    def as_json(self) -> dict[str, Any]:
        """Return the configured teacher's results, and under ``teachers`` those of all."""
        return {**self.teachers[self.configured], "teachers": self.teachers}

    def text(self) -> str:
        """Return the teachers side by side, and where the page is."""
        return render("scores.txt.j2", title="teacher", rows=self.teachers, page=self.page)


@dataclass(frozen=True)
class _Measured:
    """One teacher on the calibration part."""

    summary: dict[str, Any]  # JSON-ready
    masks: list[Mask]  # (S, S) class indices, an image each
    dice: list[float]


def evaluate_teacher(config: Config, *, progress: Progress | None = None) -> TeacherEvaluation:
    """Label the server's calibration part as stage one would, and compare with the truth.

    In torch, whatever ``precompute.backend`` says: ONNX Runtime has the configured teacher alone.
    Beside the teacher that ``sam.prompt`` asks for, the other one if it can be had at once.
    Writes ``cache/evaluate-sam.json`` and the page ``cache/evaluate-sam.html``.

    Raises:
        StageError: no partition or no teacher yet. IdentityError: another teacher's card.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    own = load_teacher(config, partition)
    configured = "adapted" if config.sam.prompt == "none" else "points"
    measured: dict[str, _Measured] = {}
    teachers: dict[str, dict[str, Any]] = {}
    with torch_threads(config.precompute.threads):
        for name in sorted(TEACHERS, key=lambda name: name != configured):
            teacher = own if name == configured else _other_teacher(name, config, own.card)
            if isinstance(teacher, str):
                teachers[name] = {"missing": teacher}
            else:
                measured[name] = _measure(config, partition, teacher, progress)
                teachers[name] = measured[name].summary
        examples = _examples(config, partition, measured, measured[configured].dice)
    in_order = {name: teachers[name] for name in TEACHERS}
    result = TeacherEvaluation(configured, in_order, cache / "evaluate-sam.html")
    page = render_evaluation(in_order, examples, variant=own.card.variant, configured=configured)
    write_bytes(result.page, page.encode())
    write_json(cache / "evaluate-sam.json", result.as_json())
    return result


def _other_teacher(name: str, config: Config, card: TeacherCard) -> Teacher | str:
    """Return a teacher that the settings do not ask for, or why it cannot be had."""
    if name == "adapted":
        return f"nothing was adapted, since sam.prompt is {config.sam.prompt}"
    reason = why_not_prompted(config)
    if reason is not None:
        return reason
    policy = config.sam.model_copy(update={"prompt": "points"}).prompt_policy
    zero_shot = {"prompt": policy, "lora_rank": None, "adapter_sha256": "none"}
    return load_zero_shot(config, card.model_copy(update=zero_shot))


def _measure(
    config: Config, partition: Partition, teacher: Teacher, progress: Progress | None
) -> _Measured:
    count = len(partition.server.calibration)
    masks, scores, groups, reliability = [], [], [], Reliability()
    for image_id, truth, mask, confidences in _label(config, partition, teacher):
        masks.append(mask)
        scores.append(image_metrics(mask, truth, num_classes=teacher.card.num_classes))
        groups.append(partition.images[image_id].group)
        reliability.add(confidence_to_probability(confidences).ravel(), (mask == truth).ravel())
        if progress is not None:
            progress(f"evaluating the teacher (prompt {teacher.card.prompt})", len(masks), count)
    summary = {
        "variant": teacher.card.variant,
        "prompt": teacher.card.prompt,
        **summarise(scores, groups, seed=config.seed),
        "ece": reliability.error(),
        "reliability": reliability.bins(),
        "empty": sum(not mask.any() for mask in masks) / count,
    }
    return _Measured(summary, masks, [score.dice for score in scores])


def _label(
    config: Config, partition: Partition, teacher: Teacher
) -> Iterator[tuple[str, Mask, Mask, Mask]]:
    """Yield each calibration image's id and, (S, S) uint8, its truth, label and confidences.

    In stage one's batches, which shrink as there when memory runs out.
    """
    size, step = config.data.image_size, config.precompute.batch_size
    patient, ids = MemoryAwareTeacher(teacher, step), partition.server.calibration
    for start in range(0, len(ids), step):
        batch = ids[start : start + step]
        pairs = [  # shrunk one by one: a batch of originals may not fit into memory
            (fit_longest_side(item.image, teacher.card.input_size), resize_mask(item.mask, size))
            for item in load_labelled(config, partition, batch)
        ]
        labels = patient.label([image for image, _ in pairs], size)
        truths = [truth for _, truth in pairs]
        yield from zip(batch, truths, labels.masks, labels.confidences, strict=True)


def _examples(
    config: Config, partition: Partition, measured: dict[str, _Measured], dice: list[float]
) -> list[TeacherExample]:
    """Choose images from the worst to the best Dice, evenly by rank, with every teacher's mask."""
    ranked = np.argsort(dice, kind="stable")
    places = np.linspace(0, len(ranked) - 1, min(EXAMPLES, len(ranked))).round().astype(int)
    chosen = [int(ranked[place]) for place in places]
    ids = [partition.server.calibration[i] for i in chosen]
    size, examples = config.data.image_size, []
    for i, item in zip(chosen, load_labelled(config, partition, ids), strict=True):
        found = {name: measured[name] for name in TEACHERS if name in measured}
        scores = ", ".join(f"{of.dice[i]:.2f} {name}" for name, of in found.items())
        masks = {name: of.masks[i] for name, of in found.items()}
        masks = {"truth": resize_mask(item.mask, size), **masks}
        caption = f"{item.image_id}: Dice {scores}"
        examples.append((caption, resize_image(item.image, size), masks))
    return examples
