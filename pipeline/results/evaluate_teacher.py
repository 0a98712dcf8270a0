"""``samfed evaluate-sam``: the teacher where truth is known, beside SAM as it comes.

On a page teachers stand side by side, so that one sees whether SAM is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import load_labelled, resize_image, resize_mask
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import write_bytes, write_json
from pipeline.labelling.backoff import MemoryAwareTeacher
from pipeline.progress import Progress
from pipeline.results.colours import COLOURS
from pipeline.results.curves import reliability_plot
from pipeline.results.pages import Key, Mask, class_keys, example_panels, render
from pipeline.results.scores import scales
from pipeline.runtime import torch_threads
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.prompts import why_not_prompted
from pipeline.sam.teacher import Teacher, load_teacher, load_zero_shot
from pipeline.segmentation.metrics import image_metrics
from pipeline.segmentation.reliability import Reliability
from pipeline.segmentation.statistics import summarise
from pipeline.stores.pseudo_labels import confidence_to_probability
from pipeline.stores.teacher_card import TeacherCard

TEACHERS = ("adapted", "points")
EXAMPLES = 8  # images that the page shows

#: A caption, an image (S, S, 3) RGB, and (S, S) masks: its ``truth``, and each teacher's.
Example = tuple[str, NDArray[np.uint8], Mapping[str, Mask]]


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


class _Measured(NamedTuple):
    """One teacher on the calibration part."""

    summary: dict[str, Any]  # JSON-ready
    masks: list[Mask]  # (S, S) class indices, an image each
    dice: list[float]


def evaluate_teacher(
    config: Config, *, out: Path | None = None, progress: Progress | None = None
) -> TeacherEvaluation:
    """Label the server's calibration part as stage one would, and compare with the truth.

    In torch, whatever ``precompute.backend`` says: ONNX Runtime has the configured teacher alone.
    Beside the teacher that ``sam.prompt`` asks for, the other one if it can be had at once.
    Writes ``evaluate-sam.json`` and the page ``evaluate-sam.html`` to ``out``, else to the cache.

    Raises:
        StageError: no partition or no teacher yet. IdentityError: another teacher's card.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json", with_public=True)
    own = load_teacher(config, partition)
    configured = "adapted" if config.sam.prompt == "none" else "points"
    measured: dict[str, _Measured] = {}
    teachers: dict[str, dict[str, Any]] = {}
    with torch_threads(config.precompute.threads):
        for name in TEACHERS:
            teacher = own if name == configured else _other_teacher(name, config, own.card)
            if isinstance(teacher, str):
                teachers[name] = {"missing": teacher}
            else:
                measured[name] = _measure(config, partition, teacher, progress)
                teachers[name] = measured[name].summary
    examples = list(_examples(config, partition, measured, ranked_by=configured))
    result = TeacherEvaluation(configured, teachers, (out or cache) / "evaluate-sam.html")
    page = render_evaluation(
        teachers,
        examples,
        variant=own.card.variant,
        configured=configured,
        classes=config.data.classes,
    )
    write_bytes(result.page, page.encode())
    write_json(result.page.with_suffix(".json"), result.as_json(), sort_keys=False)
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
        entry = partition.images[image_id]
        px, mm = scales(config, entry.size_mm)
        scores.append(
            image_metrics(mask, truth, num_classes=teacher.card.num_classes, px=px, mm=mm)
        )
        groups.append(entry.group)
        reliability.add(confidence_to_probability(confidences).ravel(), (mask == truth).ravel())
        if progress is not None:
            progress(f"evaluating the teacher (prompt {teacher.card.prompt})", len(masks), count)
    summary = {
        "variant": teacher.card.variant,
        "prompt": teacher.card.prompt,
        "adapter_sha256": teacher.card.adapter_sha256,
        **summarise(scores, groups, seed=config.seed, names=config.data.classes),
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
    config: Config, partition: Partition, measured: Mapping[str, _Measured], *, ranked_by: str
) -> Iterator[Example]:
    """Yield images from the worst to the best Dice, evenly by rank, with every teacher's mask."""
    ranked = np.argsort(measured[ranked_by].dice, kind="stable")
    places = np.linspace(0, len(ranked) - 1, min(EXAMPLES, len(ranked))).round().astype(int)
    chosen = [int(ranked[place]) for place in places]
    ids = [partition.server.calibration[i] for i in chosen]
    size = config.data.image_size
    for i, item in zip(chosen, load_labelled(config, partition, ids), strict=True):
        scores = ", ".join(f"{of.dice[i]:.2f} {name}" for name, of in measured.items())
        masks = {name: of.masks[i] for name, of in measured.items()}
        truth = resize_mask(item.mask, size)
        caption = f"{item.image_id}: Dice {scores}"
        yield caption, resize_image(item.image, size), {"truth": truth, **masks}


def render_evaluation(
    teachers: Mapping[str, dict[str, Any]],
    examples: Sequence[Example],
    *,
    variant: str,
    configured: str,
    classes: Sequence[str] = ("foreground",),
) -> str:
    """Return the page as HTML text; the same input gives the same bytes.

    Args:
        teachers: by name what ``evaluate_teacher`` measured, or why it did not (``missing``).
        variant: of SAM.
        configured: the teacher that ``sam.prompt`` asks for. classes: names of the classes 1..K.
    """
    named = zip(teachers, COLOURS, strict=False)
    keys = [Key(name, colour) for name, colour in named if "missing" not in teachers[name]]
    return render(
        "evaluate_sam.html.j2",
        teachers=teachers,
        variant=variant,
        configured=configured,
        reliability=reliability_plot({key: teachers[key.label]["reliability"] for key in keys}),
        keys=keys,
        examples=[
            {"caption": caption} | example_panels(image, masks)
            for caption, image, masks in examples
        ],
        class_keys=class_keys((m for _, _, masks in examples for m in masks.values()), classes),
    )
