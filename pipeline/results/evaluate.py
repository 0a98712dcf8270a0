"""``samfed evaluate``: the final models on every client's test part."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from pipeline.config import Config, NetworkConfig
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import write_bytes, write_json
from pipeline.federation.runs import RunFolder
from pipeline.federation.views import as_tensor
from pipeline.progress import Progress
from pipeline.results.finished import Evaluation
from pipeline.segmentation.metrics import ImageMetrics, image_metrics, summarise
from pipeline.segmentation.networks import build_model, predict_masks
from pipeline.stores.image_store import read_image_store

log = logging.getLogger("samfed.evaluation")

ROUND_MEANS = ("loss", "agreement", "coverage", "pseudo_label_dice", "gradient_norm", "drift")
NO_SCORES = dict.fromkeys(("dice", "iou", "hd95", "assd"))
ROUND_SUMS = ("bytes_up", "bytes_down")


class Score(NamedTuple):
    """One test image and its scores: a line of ``per_image.csv``."""

    client: str
    image_id: str
    group: str
    metrics: ImageMetrics


def evaluate(
    config: Config, run: RunFolder, *, out: Path | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score the run's final models; write ``metrics.json``, ``per_image.csv`` and ``rounds.csv``.

    They go into the run's folder, or into a folder of the run's name in ``out``.

    The global model answers for every client, or each client's own for itself, as the run's own
    ``params.yaml`` says; the images are those of ``config``'s cache. Distances are in pixels at
    ``data.image_size``.

    Where no client has a test part there are no scores, and a warning says why.

    Raises:
        StageError: the run is not complete. IdentityError: the partition or the image stores are
        not the ones that the run was made on.
    """
    used = run.config().model_copy(update={"cache": config.cache})
    partition_file = config.cache.root / "partition.json"
    run.check_partition(partition_file)
    partition = load_partition(partition_file)
    scores = list(_score(used, run, partition, progress))
    if not scores:
        log.warning("no client has a test part%s; nothing is scored", _why_untested(partition))
    federate = used.federate
    found = Evaluation(federate.method, used.seed, federate.rounds, _test(scores, seed=used.seed))
    folder = run.path if out is None else out / run.path.name
    write_bytes(folder / "per_image.csv", _per_image(scores).encode())
    write_bytes(folder / "rounds.csv", round_table(run.history()).encode())
    write_json(folder / "metrics.json", found.as_json())
    return found


def _score(
    config: Config, run: RunFolder, partition: Partition, progress: Progress | None
) -> Iterator[Score]:
    """Yield the scores of every client's test images, client by client."""
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
        predicted = predict_masks(model, as_tensor(part)).numpy()
        for image_id, mask, truth in zip(ids, predicted, part.labels, strict=True):
            score = image_metrics(mask, truth, num_classes=num_classes)
            yield Score(name, image_id, partition.images[image_id].group, score)
            done += 1
            if progress is not None:
                progress("evaluating, images", done, total)


def _why_untested(partition: Partition) -> str:
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
        StageError: the run is not complete.
    """
    weights = run.load_model(client)
    # pretrained weights would be overwritten, and their file need not be here any more
    network = (network or config.model).model_copy(update={"encoder_weights": None})
    model = build_model(config, seed=config.seed, network=network)
    model.load_state_dict(weights)
    return model


def _test(scores: Sequence[Score], *, seed: int) -> dict[str, Any]:
    """Summarise all images, those of each client, and the clients, each counting the same."""
    if not scores:
        return {"pooled": {"n": 0} | NO_SCORES, "clients": {}, "client_mean": NO_SCORES}

    def summary(chosen: Sequence[Score]) -> dict[str, Any]:
        return summarise([s.metrics for s in chosen], [s.group for s in chosen], seed=seed)

    names = dict.fromkeys(score.client for score in scores)
    clients = {name: summary([s for s in scores if s.client == name]) for name in names}
    means = {key: float(np.mean([client[key] for client in clients.values()])) for key in NO_SCORES}
    return {"pooled": summary(scores), "clients": clients, "client_mean": means}


def _per_image(scores: Iterable[Score]) -> str:
    head = ["client", "image_id", "group", *(field.name for field in fields(ImageMetrics))]
    return _as_csv(head, ([*score[:3], *astuple(score.metrics)] for score in scores))


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
    return _as_csv(["round", "val_dice", *ROUND_MEANS, *ROUND_SUMS, "seconds"], lines)


def _as_csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table with six digits of each float, and nothing for None."""
    out = io.StringIO()
    short = ([f"{v:.6g}" if isinstance(v, float) else v for v in line] for line in lines)
    csv.writer(out, lineterminator="\n").writerows([head, *short])
    return out.getvalue()
