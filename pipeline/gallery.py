"""Picture rows of the report: image, truth, SAM, client, and the weight agreement gives a pixel."""

from __future__ import annotations

import torch

from pipeline.agreement import AgreementState, agree, calibrate
from pipeline.config import Config
from pipeline.models import build_model, predict_probabilities
from pipeline.partition import load_partition
from pipeline.report import GalleryRow
from pipeline.runs import RunFolder
from pipeline.stores import Labels, confidence_to_probability, read_image_store, read_labels

_SERVER_ROWS = 4
_ROWS_PER_CLIENT = 1


def build_gallery(config: Config, run: RunFolder) -> list[GalleryRow]:
    """Rows from the server's calibration part, where truth is known, and from every client.

    A client's training images have no truth; its rows show what the rounds worked with. Runs that
    never used SAM have no SAM or weight panel.
    """
    made = run.config()
    model = build_model(made.model, num_classes=made.data.num_classes, seed=made.seed)
    model.load_state_dict(run.load_model())
    checkpoint = run.load_checkpoint()
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    server = read_image_store(cache / "images" / "server" / "calibration.zarr")
    assert server.labels is not None
    owners = [("server", partition.server.calibration, "calibration", _SERVER_ROWS)]
    owners += [(n, part.train, "train", _ROWS_PER_CLIENT) for n, part in partition.clients.items()]
    uses_sam = made.federate.method in ("sam_only", "sam_fed", "shuffled")
    calibration = None
    rows: list[GalleryRow] = []
    for owner, ids, split, count in owners:
        stored = read_image_store(cache / "images" / owner / f"{split}.zarr")
        chosen = list(range(0, len(ids), max(1, len(ids) // count)))[:count]
        if owner == "server":
            chosen = list(range(len(ids)))  # all of them calibrate; few are shown
        images = torch.from_numpy(stored.images[chosen]).permute(0, 3, 1, 2).contiguous()
        opinion = predict_probabilities(model, images)
        predicted = opinion.argmax(dim=1).to(torch.uint8).numpy()
        labels: Labels | None = None
        weight = None
        if uses_sam:
            path = cache / "sam" / f"{owner}.zarr"
            every = read_labels(path, image_ids=ids, label_size=made.data.image_size)
            labels = Labels(every.masks[chosen], every.confidences[chosen], every.scores[chosen])
            masks = torch.from_numpy(labels.masks).long()
            belief = torch.from_numpy(confidence_to_probability(labels.confidences))
            if owner == "server":
                truth = torch.from_numpy(server.labels).long()
                calibration = calibrate(masks, belief, opinion, truth)
            assert calibration is not None
            state = AgreementState.initial(made.data.num_classes)
            if checkpoint is not None and owner in checkpoint.client_states:
                state = AgreementState(checkpoint.client_states[owner])
            weight = agree(
                masks, belief, opinion, config=made.agreement, state=state, calibration=calibration
            ).weight.numpy()
        for row, index in enumerate(chosen[:count]):
            rows.append(
                GalleryRow(
                    caption=f"{owner}: {ids[index]}",
                    image=stored.images[index],
                    truth=server.labels[index] if owner == "server" else None,
                    sam=labels.masks[row] if labels is not None else None,
                    client=predicted[row],
                    weight=weight[row] if weight is not None else None,
                )
            )
    return rows
