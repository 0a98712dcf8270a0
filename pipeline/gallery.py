"""Picture rows of the report: image, truth, SAM, client, and the weight agreement gives a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.agreement import AgreementState, Calibration, agree, calibrate
from pipeline.config import SAM_METHODS, Config
from pipeline.models import build_model, predict_probabilities
from pipeline.partition import load_partition
from pipeline.report import GalleryRow
from pipeline.runs import RunFolder
from pipeline.stores.images import ImageSet, read_image_store
from pipeline.stores.labels import LabelStore, confidence_to_probability, read_labels

_SERVER_ROWS = 4
_ROWS_PER_CLIENT = 1


@dataclass(frozen=True)
class _Part:
    """One owner's images with the final model's opinion and, where the run used SAM, its labels."""

    stored: ImageSet
    opinion: Tensor  # (N, K+1, S, S) float32
    masks: Tensor | None  # (N, S, S) int64
    beliefs: Tensor | None  # (N, S, S) float32


def build_gallery(config: Config, run: RunFolder) -> list[GalleryRow]:
    """Rows from the server's calibration part, where truth is known, and from every client.

    A client's training images have no truth; its rows show what the rounds worked with. Runs that
    never used SAM have no SAM or weight panel.
    """
    made = run.config().model_copy(update={"cache": config.cache})
    model = build_model(made.model, num_classes=made.data.num_classes, seed=made.seed)
    model.load_state_dict(run.load_model())
    checkpoint = run.load_checkpoint()
    states = checkpoint.client_states if checkpoint is not None else {}
    partition = load_partition(config.cache.root / "partition.json")
    groups = [partition.images[i].group for i in partition.server.calibration]
    server = _load(made, model, "server", "calibration", partition.server.calibration)
    calibration = _calibrate(server, groups)
    rows = _rows(
        made, "server", server, range(len(server.stored))[:_SERVER_ROWS], calibration, None
    )
    for name, client in partition.clients.items():
        step = max(1, len(client.train) // _ROWS_PER_CLIENT)
        part = _load(made, model, name, "train", client.train)
        chosen = range(0, len(client.train), step)[:_ROWS_PER_CLIENT]
        rows += _rows(made, name, part, chosen, calibration, states.get(name))
    return rows


def _load(
    made: Config, model: torch.nn.Module, owner: str, split: str, ids: Sequence[str]
) -> _Part:
    cache = made.cache.root
    stored = read_image_store(
        cache / "images" / owner / f"{split}.zarr", image_ids=ids, size=made.data.image_size
    )
    images = torch.from_numpy(stored.images).permute(0, 3, 1, 2).contiguous()
    opinion = predict_probabilities(model, images)
    if made.federate.method not in SAM_METHODS:
        return _Part(stored, opinion, None, None)
    path = cache / "sam" / f"{owner}.zarr"
    partition = load_partition(cache / "partition.json")
    labels = read_labels(path, rows=partition.row_keys(ids), identity=LabelStore(path).identity)
    beliefs = torch.from_numpy(confidence_to_probability(labels.confidences))
    return _Part(stored, opinion, torch.from_numpy(labels.masks).long(), beliefs)


def _calibrate(server: _Part, groups: Sequence[str]) -> Calibration:
    if server.masks is None or server.beliefs is None or server.stored.labels is None:
        return Calibration()
    truth = torch.from_numpy(server.stored.labels).long()
    return calibrate(server.masks, server.beliefs, server.opinion, truth, groups=groups)


def _rows(
    made: Config,
    owner: str,
    part: _Part,
    chosen: Sequence[int],
    calibration: Calibration,
    confidence: Tensor | None,
) -> list[GalleryRow]:
    """Gallery rows of some images of one owner."""
    weights: NDArray[np.float32] | None = None
    if part.masks is not None and part.beliefs is not None:
        state = AgreementState.initial(made.data.num_classes)
        if confidence is not None:
            state = AgreementState(confidence)
        weights = agree(
            part.masks,
            part.beliefs,
            part.opinion,
            config=made.agreement,
            state=state,
            calibration=calibration,
        ).weight.numpy()
    predicted = part.opinion.argmax(dim=1).to(torch.uint8).numpy()
    labels = part.stored.labels
    return [
        GalleryRow(
            caption=f"{owner}: {part.stored.image_ids[index]}",
            image=part.stored.images[index],
            truth=labels[index] if labels is not None else None,
            sam=part.masks[index].to(torch.uint8).numpy() if part.masks is not None else None,
            client=predicted[index],
            weight=weights[index] if weights is not None else None,
        )
        for index in chosen
    ]
