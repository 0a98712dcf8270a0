"""``samfed evaluate --data``: a finished model on labelled images that its run has not seen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.folder import scan
from pipeline.data.images import read_image, resize_mask
from pipeline.data.masks import read_mask
from pipeline.data.partition import ImageFiles, load_partition
from pipeline.data.reading import map_ahead
from pipeline.disk import is_folder_name, write_bytes, write_json
from pipeline.errors import ConfigError, DataError
from pipeline.federation.runs import RunFolder
from pipeline.inference.loading import Choice, find_model, load_model
from pipeline.inference.model import Model, Pixels
from pipeline.inference.outputs import at_own_size
from pipeline.progress import Progress
from pipeline.results.evaluate import scoring_settings
from pipeline.results.external import FOLDER, External
from pipeline.results.scores import Score, image_table, scales, summarise_scores
from pipeline.segmentation.metrics import image_metrics
from pipeline.segmentation.reliability import Reliability

log = logging.getLogger("samfed.evaluation")

_BATCH = 16


class _Test(NamedTuple):
    """A folder's labelled images, mm between their rows and columns, and how they are scored."""

    root: Path
    labelled: Mapping[str, ImageFiles]
    spacing: Mapping[str, tuple[float, float]]
    settings: Config


class _Item(NamedTuple):
    """An image as the model takes it, with its truth (S, S) uint8, and a digest of both files."""

    image_id: str
    files: ImageFiles
    frame: Pixels
    truth: NDArray[np.uint8]
    digest: str
    size_mm: tuple[float, float] | None


class _Found(NamedTuple):
    """What a model says of an image: its scores, and what is known of each of its pixels."""

    item: _Item
    score: Score
    confidence: NDArray[np.float32]  # (S, S)
    right: NDArray[np.bool_]  # (S, S)
    unlike: bool


def evaluate_external(
    config: Config,
    choice: Choice,
    data: Path,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> External:
    """Score a run's model on a labelled folder in the input layout; write ``external/<name>.json``.

    Scores are taken in the client's frame, as those of ``samfed evaluate``; images without a mask
    are left out. ``<name>.csv`` beside it has a line for each image.

    Args:
        name: of the test; the folder's name if None.

    Raises:
        DataError: no labelled image, or one that cannot be used. ConfigError: the name can be no
        file's, or the model is no run's. Others as ``load_model``.
    """
    run, used = _run(config, choice)
    name, kind = name or data.resolve().name, _kind(choice)
    stem = name if kind == "global" else f"{name}-{kind}"
    _check_name(stem)
    (test, left_out), model = _test(config, used, data), load_model(config, choice)
    scores, reliability, digests, unlike = list[Score](), Reliability(), list[str](), 0
    names, how = used.data.classes, used.evaluate
    for found in _evaluated(model, test):
        scores.append(found.score)
        reliability.add(found.confidence.ravel(), found.right.ravel())
        digests.append(f"{found.item.image_id} {found.item.digest}")
        unlike += found.unlike
        if progress is not None:
            progress("evaluating", len(scores), len(test.labelled))
    _name_own(config, digests)
    result = External(
        name=name,
        model=kind,
        digest=model.digest,
        data_sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        without_mask=left_out,
        unlike=None if choice.teacher else unlike / len(scores),
        ece=reliability.error(),
        reliability=reliability.bins(),
        test=summarise_scores(scores, seed=used.seed, names=names),
        tolerance={"px": how.tolerance_px, "mm": how.tolerance_mm},
    )
    write_bytes(run.path / FOLDER / f"{stem}.csv", image_table(scores, names).encode())
    write_json(run.path / FOLDER / f"{stem}.json", result.as_json(), sort_keys=False)
    return result


def _test(config: Config, used: Config, data: Path) -> tuple[_Test, int]:
    """Return the labelled images of a folder, and how many others there are."""
    folder = scan(data, mask_pattern=config.data.mask_pattern)
    labelled = {key: files for key, files in folder.images.items() if files.mask is not None}
    if not labelled:
        count = len(folder.images)
        raise DataError(f"{data}: none of {count} images has a mask; there is no truth")
    return _Test(data, labelled, folder.spacing, used), len(folder.images) - len(labelled)


def _name_own(config: Config, digests: Sequence[str]) -> None:
    """Warn of images that the partition of the cache holds: a test on them is not external."""
    path = config.cache.root / "partition.json"
    if path.is_file():
        known = {entry.image_sha256 for entry in load_partition(path).images.values()}
        parts = [line.rsplit(" ", 2) for line in digests]  # id and both files' sha256
        own = [image_id for image_id, image, _ in parts if image in known]
        if own:
            log.warning(
                "%d of %d images, e.g. %s, are in %s too: if the run was made on it, this test is "
                "not external",
                len(own),
                len(digests),
                own[0],
                path,
            )


def _check_name(name: str) -> None:
    if not is_folder_name(name):
        raise ConfigError(f"--as {name!r}: expected what a file can be called")


def _kind(choice: Choice) -> str:
    return "teacher" if choice.teacher else choice.client or "global"


def _run(config: Config, choice: Choice) -> tuple[RunFolder, Config]:
    """Return the run that is asked for, and its settings."""
    path = find_model(config, choice.model)
    if not path.is_dir():
        raise ConfigError(f"{choice.model}: --data needs a run, which keeps the scores")
    run = RunFolder(path)
    return run, scoring_settings(run.config(), config)


def _evaluated(model: Model, test: _Test) -> Iterator[_Found]:
    """Yield what the model says of each image, in the order of their ids; a few are read ahead."""
    items = map_ahead(lambda image_id: _read(model, test, image_id), sorted(test.labelled))
    size = test.settings.data.image_size
    while batch := list(islice(items, _BATCH)):
        outputs = model.predict([item.frame for item in batch])
        far = np.zeros(len(batch)) if outputs.distances is None else outputs.distances
        for item, probabilities, distance in zip(batch, outputs.probabilities, far, strict=True):
            own = at_own_size(probabilities, (size, size))
            mask = own.argmax(axis=0).astype(np.uint8)
            px, mm = scales(test.settings, item.size_mm)
            metrics = image_metrics(mask, item.truth, num_classes=model.num_classes, px=px, mm=mm)
            score = Score(item.files.site, item.image_id, item.files.group, metrics)
            right = mask == item.truth
            yield _Found(item, score, own.max(axis=0), right, bool(distance > model.threshold))


def _read(model: Model, test: _Test, image_id: str) -> _Item:
    files, spacing = test.labelled[image_id], test.spacing.get(image_id)
    image = read_image(test.root / files.image)
    height, width, _ = image.pixels.shape
    mask = read_mask(
        test.root / str(files.mask),
        size_hw=(height, width),
        num_classes=model.num_classes,
        image_orientation=image.orientation,
    )
    return _Item(
        image_id,
        files,
        model.frame(image.pixels),
        resize_mask(mask.pixels, test.settings.data.image_size),
        f"{image.sha256} {mask.sha256}",
        None if spacing is None else (height * spacing[0], width * spacing[1]),
    )
