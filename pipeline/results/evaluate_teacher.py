"""``samfed evaluate-sam``: the teacher where truth is known, beside SAM as it comes, and no SAM.

On a page they stand side by side, so that one sees whether SAM is worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from pipeline.results.without_sam import Outlook, Predicted, networks_without_sam, outlook
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
NETWORK = "no SAM"  # what table and page call the network
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
    network: dict[str, Any]  # the same numbers of the clients' network, trained without SAM
    outlook: Outlook
    page: Path

    def as_json(self) -> dict[str, Any]:
        """Return the configured teacher's results, and beside them those of all."""
        return {
            **self.teachers[self.configured],
            "teachers": self.teachers,
            "network": self.network,
            "outlook": asdict(self.outlook),
        }

    def text(self) -> str:
        """Return the teachers and the network side by side, the outlook, and where the page is."""
        last = f"{self.outlook.text}\n{self.page}"
        return render("scores.txt.j2", title="labels of", rows=self.rows, page=last)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The teachers and the network by the names that table and page give them."""
        return {**self.teachers, NETWORK: self.network}


class _Measured(NamedTuple):
    """One teacher, or the network, on the calibration part."""

    summary: dict[str, Any]  # JSON-ready
    masks: list[Mask]  # (S, S) class indices, an image each
    dice: list[float]
    groups: list[str]


class _Label(NamedTuple):
    """What a teacher or the network says of one calibration image."""

    image_id: str
    truth: Mask  # (S, S) class indices
    mask: Mask
    probabilities: NDArray[np.float32]  # (S, S), of the mask's class


def evaluate_teacher(
    config: Config, *, out: Path | None = None, progress: Progress | None = None
) -> TeacherEvaluation:
    """Label the server's calibration part as stage one would, and compare with the truth.

    In torch, whatever ``precompute.backend`` says: ONNX Runtime has the configured teacher alone.
    Beside the teacher that ``sam.prompt`` asks for, the other one if it can be had at once, and the
    clients' network as it is before the rounds, trained on the same training part without SAM.
    Writes ``evaluate-sam.json`` and the page ``evaluate-sam.html`` to ``out``, else to the cache,
    and then the network too, which the rounds find there.

    Raises:
        StageError: no partition or no teacher yet. IdentityError: another teacher's card.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json", with_public=True)
    own = load_teacher(config, partition)
    configured = "adapted" if config.sam.prompt == "none" else "points"
    # first, as it is what may fail: it reads what `prepare` wrote, and writes to the cache
    networks = networks_without_sam(config, partition, keep=out is None, progress=progress)
    measured: dict[str, _Measured] = {}
    teachers: dict[str, dict[str, Any]] = {}
    with torch_threads(config.precompute.threads):
        for name in TEACHERS:
            teacher = own if name == configured else _other_teacher(name, config, own.card)
            if isinstance(teacher, str):
                teachers[name] = {"missing": teacher}
            else:
                measured[name] = _measure_teacher(config, partition, teacher, progress)
                teachers[name] = measured[name].summary
    sam = measured[configured]
    alone = measured[NETWORK] = _measure_network(config, partition, networks)
    view = outlook(sam.summary, alone.summary, (sam.dice, alone.dice), sam.groups)
    result = TeacherEvaluation(
        configured, teachers, alone.summary, view, (out or cache) / "evaluate-sam.html"
    )
    page = render_evaluation(
        result,
        list(_examples(config, partition, measured, ranked_by=configured)),
        variant=own.card.variant,
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


def _measure_teacher(
    config: Config, partition: Partition, teacher: Teacher, progress: Progress | None
) -> _Measured:
    card = teacher.card
    about = {
        "variant": card.variant,
        "prompt": card.prompt,
        "adapter_sha256": card.adapter_sha256,
    }
    return _measure(config, partition, _label(config, partition, teacher, progress), about)


def _measure_network(
    config: Config, partition: Partition, networks: Sequence[Predicted]
) -> _Measured:
    """Measure the clients' network, the best of them where they have several kinds."""
    found = []
    for network, truth, masks, probabilities in networks:
        about = {
            "architecture": network.architecture,
            "encoder": network.encoder,
            "steps": config.federate.pretrain_steps,
            "best_of": len(networks),
        }
        labels = map(_Label, partition.server.calibration, truth, masks, probabilities)
        found.append(_measure(config, partition, labels, about))
    return max(found, key=lambda each: each.summary["dice"])


def _measure(
    config: Config, partition: Partition, labels: Iterable[_Label], about: Mapping[str, Any]
) -> _Measured:
    """Compare labels with the truth; ``about`` says whose they are."""
    masks, scores, groups, reliability = [], [], [], Reliability()
    for image_id, truth, mask, probabilities in labels:
        masks.append(mask)
        entry = partition.images[image_id]
        px, mm = scales(config, entry.size_mm)
        scores.append(image_metrics(mask, truth, num_classes=config.data.num_classes, px=px, mm=mm))
        groups.append(entry.group)
        reliability.add(probabilities.ravel(), (mask == truth).ravel())
    summary = {
        **about,
        **summarise(scores, groups, seed=config.seed, names=config.data.classes),
        "ece": reliability.error(),
        "reliability": reliability.bins(),
        "empty": sum(not mask.any() for mask in masks) / len(masks),
    }
    return _Measured(summary, masks, [score.dice for score in scores], groups)


def _label(
    config: Config, partition: Partition, teacher: Teacher, progress: Progress | None
) -> Iterator[_Label]:
    """Label the calibration images in stage one's batches, which shrink when memory runs out."""
    size, step = config.data.image_size, config.precompute.batch_size
    patient, ids = MemoryAwareTeacher(teacher, step), partition.server.calibration
    what = f"evaluating the teacher (prompt {teacher.card.prompt})"
    for start in range(0, len(ids), step):
        batch = ids[start : start + step]
        pairs = [  # shrunk one by one: a batch of originals may not fit into memory
            (fit_longest_side(item.image, teacher.card.input_size), resize_mask(item.mask, size))
            for item in load_labelled(config, partition, batch)
        ]
        labels = patient.label([image for image, _ in pairs], size)
        truths = [truth for _, truth in pairs]
        probabilities = map(confidence_to_probability, labels.confidences)
        yield from map(_Label, batch, truths, labels.masks, probabilities)
        if progress is not None:
            progress(what, start + len(batch), len(ids))


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
    result: TeacherEvaluation,
    examples: Sequence[Example],
    *,
    variant: str,
    classes: Sequence[str] = ("foreground",),
) -> str:
    """Return the page as HTML text; the same input gives the same bytes.

    Args:
        variant: of SAM. classes: names of the classes 1..K.
    """
    rows = result.rows
    keys = [
        Key(name, colour)
        for name, colour in zip(rows, COLOURS, strict=False)
        if "missing" not in rows[name]
    ]
    return render(
        "evaluate_sam.html.j2",
        rows=rows,
        variant=variant,
        configured=result.configured,
        outlook=result.outlook,
        reliability=reliability_plot({key: rows[key.label]["reliability"] for key in keys}),
        keys=keys,
        examples=[
            {"caption": caption} | example_panels(image, masks)
            for caption, image, masks in examples
        ],
        class_keys=class_keys((m for _, _, masks in examples for m in masks.values()), classes),
    )
