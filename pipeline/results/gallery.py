"""Picture rows of the report: image, truth, SAM, client, and the weight agreement gives a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import AgreementState, Sources, agree
from pipeline.federation.inputs import load_inputs
from pipeline.federation.local_update import measure_calibration, rule_of
from pipeline.federation.runs import RunFolder
from pipeline.results.final_models import FinalModels
from pipeline.results.report import GalleryRow
from pipeline.segmentation.networks import predict_probabilities

_SERVER_ROWS = 4
_ROWS_PER_CLIENT = 1


def build_gallery(config: Config, run: RunFolder) -> list[GalleryRow]:
    """Rows from the server's calibration part, where truth is known, and from every client.

    A client's training images have no truth; its rows show what the rounds worked with, under the
    run's own rule and with the final model. Runs that never used SAM have no SAM or weight panel.
    Where clients have networks of their own, the first client's answers for the server's images.
    """
    made = run.config()
    # the truth that an audit scored against is not shown, and may be gone by now
    unaudited = made.federate.model_copy(update={"audit": False})
    made = made.model_copy(update={"cache": config.cache, "federate": unaudited})
    run.check_partition(config.cache.root / "partition.json")
    cohort = load_inputs(made)
    models = FinalModels(run, made, [client.name for client in cohort.clients])
    model = models.of(cohort.clients[0].name)
    checkpoint = run.load_checkpoint()
    states = checkpoint.client_states if checkpoint is not None else {}
    server = cohort.server
    initial = AgreementState.initial(made.data.num_classes)
    shown = slice(0, _SERVER_ROWS)
    rows = _rows(
        made,
        model,
        [f"server, image {i + 1}" for i in range(len(server.calibration_images))[shown]],
        server.calibration_images[shown],
        truth=server.calibration_labels[shown],
        masks=_part(server.calibration_masks, shown),
        confidences=_part(server.calibration_confidences, shown),
        state=replace(initial, calibration=measure_calibration(model, server, made)),
    )
    for client in cohort.clients:
        shown = slice(0, _ROWS_PER_CLIENT)
        labelled = client.confidences is not None
        known = states.get(client.name)
        state = initial if known is None else AgreementState.from_tensor(known)
        model = models.of(client.name)
        rows += _rows(
            made,
            model,
            [f"{client.name}, image {i + 1}" for i in range(len(client.images))[shown]],
            client.images[shown],
            truth=None if labelled else _part(client.masks, shown),
            masks=_part(client.masks, shown) if labelled else None,
            confidences=_part(client.confidences, shown),
            state=replace(state, calibration=measure_calibration(model, server, made)),
        )
    return rows


def _part(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _rows(
    made: Config,
    model: nn.Module,
    captions: Sequence[str],
    images: Tensor,
    *,
    truth: Tensor | None,
    masks: Tensor | None,
    confidences: Tensor | None,
    state: AgreementState,
) -> list[GalleryRow]:
    """Gallery rows of some images (N, 3, S, S) uint8 of one owner."""
    opinion = predict_probabilities(model, images)
    weight: Tensor | None = None
    if masks is not None and confidences is not None:
        weight = agree(
            Sources(masks.long(), confidences.float() / 255, opinion),
            config=rule_of(made.federate, made.agreement),
            state=state,
        ).weight
    predicted = opinion.argmax(dim=1).to(torch.uint8)

    def panel(values: Tensor | None, row: int) -> NDArray[Any] | None:
        return None if values is None else values[row].numpy()

    return [
        GalleryRow(
            caption=caption,
            image=images[row].permute(1, 2, 0).contiguous().numpy(),
            truth=panel(truth, row),
            sam=panel(masks, row),
            client=predicted[row].numpy(),
            weight=panel(weight, row),
        )
        for row, caption in enumerate(captions)
    ]
