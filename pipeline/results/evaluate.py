"""``samfed evaluate``: the final models on every client's test part."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from pipeline.config import Config, NetworkConfig
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import read_json, write_bytes, write_json
from pipeline.errors import CorruptStoreError
from pipeline.federation.runs import RunFolder
from pipeline.federation.views import as_tensor
from pipeline.methods import METHODS
from pipeline.progress import Progress
from pipeline.results.finished import Evaluation
from pipeline.results.gallery import FILE as GALLERY_FILE
from pipeline.results.gallery import GalleryImage, choose, save_gallery
from pipeline.results.scores import (
    Score,
    as_csv,
    group_table,
    image_table,
    scales,
    summarise_scores,
)
from pipeline.segmentation.metrics import image_metrics
from pipeline.segmentation.networks import build_model, predict_masks
from pipeline.stores.image_store import read_image_store
from pipeline.stores.teacher_card import CARD_FILE, load_card

log = logging.getLogger("samfed.evaluation")

ROUND_MEANS = ("loss", "agreement", "coverage", "pseudo_label_dice", "gradient_norm", "drift")
_TEACHER = ("variant", "prompt", "train_images", "calibration_images", "calibration_dice")
ROUND_SUMS = ("bytes_up", "bytes_down")


def evaluate(
    config: Config, run: RunFolder, *, out: Path | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score the run's final models; write ``metrics.json`` and its tables.

    They go into the run's folder, or into a folder of the run's name in ``out``: ``per_image.csv``,
    ``per_group.csv`` and ``rounds.csv``.

    The global model answers for every client, or each client's own for itself, as the run's own
    ``params.yaml`` says; the images, names of classes and tolerances are those of ``config``.
    Distances are in pixels at ``data.image_size``, and in mm where the partition knows the images'
    sizes.

    Where no client has a test part there are no scores, and a warning says why.

    Raises:
        StageError: the run is not complete. IdentityError: the partition or the image stores are
        not the ones that the run was made on.
    """
    used = scoring_settings(run.config(), config)
    partition_file = config.cache.root / "partition.json"
    run.check_partition(partition_file)
    partition = load_partition(partition_file)
    scores, gallery = list[Score](), list[GalleryImage]()
    for tested in _score(used, run, partition, progress):
        scores += tested.scores
        gallery += tested.shown
    if not scores:
        log.warning("no client has a test part%s; nothing is scored", _why_untested(partition))
    federate, names = used.federate, used.data.classes
    test = summarise_scores(scores, seed=used.seed, names=names)
    tolerance = {"px": used.evaluate.tolerance_px, "mm": used.evaluate.tolerance_mm}
    found = Evaluation(
        method=federate.method,
        seed=used.seed,
        rounds=federate.played_rounds,
        test=test,
        tolerance=tolerance,
        data=_data(partition),
        teacher=_teacher(used),
    )
    for line in found.warnings(history := run.history()):
        log.warning("%s", line)
    folder = run.path if out is None else out / run.path.name
    write_bytes(folder / "per_image.csv", image_table(scores, names).encode())
    write_bytes(folder / "per_group.csv", group_table(scores, names).encode())
    write_bytes(folder / "rounds.csv", round_table(history).encode())
    save_gallery(folder / GALLERY_FILE, gallery)
    write_json(folder / "metrics.json", found.as_json(), sort_keys=False)  # classes in order
    return found


def scoring_settings(used: Config, asked: Config) -> Config:
    """Return a run's settings with what of the present ones only says how it is scored."""
    update: dict[str, Any] = {"cache": asked.cache, "evaluate": asked.evaluate}
    if asked.data.class_names and asked.data.num_classes == used.data.num_classes:
        update["data"] = used.data.model_copy(update={"class_names": asked.data.class_names})
    return used.model_copy(update=update)


def _data(partition: Partition) -> dict[str, dict[str, Any]]:
    """Return of every owner its number of images by split, of groups and of masks, and its sites.

    Only numbers and names of sites: a run's folder holds no list of a client's training images.
    """
    found = {}
    for owner in partition.owners:
        splits = partition.splits(owner)
        entries = [partition.images[image_id] for ids in splits.values() for image_id in ids]
        found[owner] = {
            "splits": {split: len(ids) for split, ids in splits.items()},
            "groups": len({entry.group for entry in entries}),
            "masks": sum(entry.mask is not None for entry in entries),
            "sites": sorted({entry.site for entry in entries}),
        }
    return found


def _teacher(config: Config) -> dict[str, Any] | None:
    """Return the teacher's card, and what ``evaluate-sam`` measured of this very teacher."""
    cache = config.cache.root
    if (
        not METHODS[config.federate.method].uses_sam
        or not (cache / "teacher" / CARD_FILE).is_file()
    ):
        return None
    card = load_card(cache / "teacher")
    said = {key: getattr(card, key) for key in _TEACHER}
    path = cache / "evaluate-sam.json"
    measured = read_json(path, stage="evaluate-sam") if path.is_file() else {}
    of_it = [measured.get(key) for key in ("adapter_sha256", "variant", "prompt")]
    if of_it != [card.adapter_sha256, card.variant, card.prompt]:
        return said  # measured before this teacher was made, or not at all
    return said | {key: measured.get(key) for key in ("dice", "dice_ci95", "hd95", "ece", "empty")}


class _Tested(NamedTuple):
    """A client's test images: their scores, and the few that are shown."""

    scores: list[Score]
    shown: list[GalleryImage]


def _score(
    config: Config, run: RunFolder, partition: Partition, progress: Progress | None
) -> Iterator[_Tested]:
    """Yield every client's test images, client by client."""
    tested = {name: part.test for name, part in partition.clients.items() if part.test}
    size, num_classes = config.data.image_size, config.data.num_classes
    shared = None if config.heterogeneous else final_model(run, config)
    names, done, total = list(partition.clients), 0, sum(map(len, tested.values()))
    for name, ids in tested.items():
        path = config.cache.root / "images" / name / "test.zarr"
        part = read_image_store(path, image_ids=ids, size=size, num_classes=num_classes)
        assert part.labels is not None
        network = config.network_of(names.index(name))
        model = shared or final_model(run, config, client=name, network=network)
        predicted, scores = predict_masks(model, as_tensor(part)).numpy(), list[Score]()
        for image_id, mask, truth in zip(ids, predicted, part.labels, strict=True):
            entry = partition.images[image_id]
            px, mm = scales(config, entry.size_mm)
            score = image_metrics(mask, truth, num_classes=num_classes, px=px, mm=mm)
            scores.append(Score(name, image_id, entry.group, score))
            done += 1
            if progress is not None:
                progress("evaluating, images", done, total)
        yield _Tested(scores, choose(scores, part.images, part.labels, predicted))


def _why_untested(partition: Partition) -> str:
    if not partition.clients:
        return ", as all are at sites of their own"
    ids = [i for part in partition.clients.values() for _, each in part for i in each]
    bare = all(partition.images[i].mask is None for i in ids)
    return ", as their images have no masks" if bare else " (partition.test_fraction)"


def final_model(
    run: RunFolder,
    config: Config,
    *,
    client: str | None = None,
    network: NetworkConfig | None = None,
) -> nn.Module:
    """Return the run's global model, or a client's own, which has its own ``network``.

    Raises:
        StageError: the run is not complete. CorruptStoreError: its settings name another network.
    """
    weights = run.load_model(client)
    # pretrained weights would be overwritten, and their file need not be here any more
    network = (network or config.model).model_copy(update={"encoder_weights": None})
    model = build_model(config, seed=config.seed, network=network)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CorruptStoreError(
            f"{run.path / 'params.yaml'}: found settings of another network than that of the run's "
            "weights; run `samfed federate`, which wrote it"
        ) from error
    return model


def round_table(history: Iterable[Mapping[str, Any]]) -> str:
    """Return curves for `dvc plots`: a line of CSV for each round, empty where there is no value.

    Validation Dice, means and sums over the clients that took part, and seconds.
    """
    lines = []
    for entry in history:
        line = [entry["round"], entry["val"]["dice"]]
        for key in (*ROUND_MEANS, *ROUND_SUMS):
            known = [c[key] for c in entry["clients"].values() if c.get(key) is not None]
            combine = sum if key in ROUND_SUMS else np.mean
            line.append(combine(known) if known else None)
        lines.append([*line, entry["seconds"]])
    return as_csv(["round", "val_dice", *ROUND_MEANS, *ROUND_SUMS, "seconds"], lines)
