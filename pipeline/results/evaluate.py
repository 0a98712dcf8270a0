"""``samfed evaluate``: the final model on every client's test part."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.disk import write_bytes, write_json
from pipeline.errors import StageError
from pipeline.federation.runs import RunFolder
from pipeline.federation.views import as_tensor
from pipeline.results.final_models import FinalModels
from pipeline.segmentation.metrics import ImageMetrics, image_metrics, summarise
from pipeline.segmentation.networks import predict_masks
from pipeline.stores.image_store import read_image_store

Progress = Callable[[str, int, int], None]

_ROUND_MEANS = ("loss", "agreement", "coverage", "pseudo_label_dice", "gradient_norm", "drift")
_ROUND_SUMS = ("bytes_up", "bytes_down")


def evaluate(config: Config, run: RunFolder, *, progress: Progress | None = None) -> dict[str, Any]:
    """Score the run's final models; write ``metrics.json``, ``per_image.csv`` and ``rounds.csv``.

    The global model answers for every client, or each client's own for itself, as the run's own
    ``params.yaml`` says; the images are those of ``config``'s cache. Distances are in pixels at
    ``data.image_size``.

    Raises:
        StageError: the run is not complete, or no client has a test part. IdentityError: the
        partition or the image stores are not the ones that the run was made on.
    """
    made = run.config()
    cache = config.cache.root
    run.check_partition(cache / "partition.json")
    num_classes = made.data.num_classes
    partition = load_partition(cache / "partition.json")
    models = FinalModels(run, made, list(partition.clients))
    tested = {name: part.test for name, part in partition.clients.items() if part.test}
    if not tested:
        raise StageError(
            "no client has a test part; raise partition.test_fraction and prepare again"
        )
    rows: list[tuple[str, str, str, ImageMetrics]] = []  # client, image, group, metrics
    for number, (name, ids) in enumerate(tested.items(), start=1):
        path = cache / "images" / name / "test.zarr"
        part = read_image_store(
            path, image_ids=ids, size=made.data.image_size, num_classes=num_classes
        )
        assert part.labels is not None
        predicted = predict_masks(models.of(name), as_tensor(part)).numpy()
        for image_id, mask, truth in zip(ids, predicted, part.labels, strict=True):
            score = image_metrics(mask, truth, num_classes=num_classes)
            rows.append((name, image_id, partition.images[image_id].group, score))
        if progress is not None:
            progress("evaluating", number, len(tested))
    metrics = {
        "method": made.federate.method,
        "seed": made.seed,
        "rounds": made.federate.rounds,
        "test": _tables(rows, seed=made.seed),
    }
    _write_rows(run.path / "per_image.csv", rows)
    _write_rounds(run.path / "rounds.csv", run.history())
    write_json(run.path / "metrics.json", metrics)
    return metrics


def _tables(rows: list[tuple[str, str, str, ImageMetrics]], *, seed: int) -> dict[str, Any]:
    """Pooled over images, per client, and the plain mean over clients."""
    names = list(dict.fromkeys(row[0] for row in rows))
    clients = {}
    for name in names:
        own = [row for row in rows if row[0] == name]
        clients[name] = summarise([row[3] for row in own], [row[2] for row in own], seed=seed)
    return {
        "pooled": summarise([row[3] for row in rows], [row[2] for row in rows], seed=seed),
        "clients": clients,
        "client_mean": {
            key: float(np.mean([client[key] for client in clients.values()]))
            for key in ("dice", "iou", "hd95", "assd")
        },
    }


def _write_rounds(path: Path, history: list[dict[str, Any]]) -> None:
    """Curves for `dvc plots`: validation Dice, means and sums over a round's clients, seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["round", "val_dice", *_ROUND_MEANS, *_ROUND_SUMS, "seconds"])
    for entry in history:
        said = {
            key: [c[key] for c in entry["clients"].values() if c.get(key) is not None]
            for key in (*_ROUND_MEANS, *_ROUND_SUMS)
        }
        means = [float(np.mean(said[key])) if said[key] else None for key in _ROUND_MEANS]
        sums = [sum(said[key]) if said[key] else "" for key in _ROUND_SUMS]
        head, tail = _short([entry["val"]["dice"], *means]), _short([entry["seconds"]])
        writer.writerow([entry["round"], *head, *sums, *tail])
    write_bytes(path, out.getvalue().encode())


def _short(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.6g}" for value in values]


def _write_rows(path: Path, rows: list[tuple[str, str, str, ImageMetrics]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["client", "image_id", "group", *(f.name for f in fields(ImageMetrics))])
    for client, image_id, group, score in rows:
        writer.writerow([client, image_id, group, *(f"{value:.6g}" for value in astuple(score))])
    write_bytes(path, out.getvalue().encode())
