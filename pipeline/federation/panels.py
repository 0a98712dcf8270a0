"""Making a run's example images, of D_p at whoever has the model and of a client at the client."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import AgreementState, Calibration, Sources, agree
from pipeline.federation.examples import Example
from pipeline.federation.targets import agreement_rule
from pipeline.federation.views import ClientData, PublicSet
from pipeline.segmentation.networks import predict_probabilities

_PUBLIC_EXAMPLES = 4
_CLIENT_EXAMPLES = 1


def public_examples(
    model: nn.Module, public: PublicSet, calibration: Calibration, *, config: Config
) -> list[Example]:
    """Return the first images of D_p's calibration part, where the truth is known."""
    shown = slice(0, _PUBLIC_EXAMPLES)
    data = ClientData(
        "server",
        public.calibration_images[shown],
        _part(public.calibration_masks, shown),
        _part(public.calibration_confidences, shown),
        public.calibration_labels[shown],
    )
    initial = AgreementState.initial(config.data.num_classes)
    state = AgreementState(initial.class_confidence, calibration)
    return _examples(model, data, state, config=config)


def client_examples(
    model: nn.Module, client: ClientData, state: AgreementState, *, config: Config
) -> list[Example]:
    """Return a client's first training image, as the rounds worked with it.

    Its truth is shown only where the method trains on it, not where an audit scores against it.
    """
    shown, labelled = slice(0, _CLIENT_EXAMPLES), client.confidences is not None
    data = ClientData(
        client.name,
        client.images[shown],
        _part(client.masks, shown) if labelled else None,
        _part(client.confidences, shown),
        None if labelled else _part(client.masks, shown),
    )
    return _examples(model, data, state, config=config)


def _examples(
    model: nn.Module, data: ClientData, state: AgreementState, *, config: Config
) -> list[Example]:
    """Return an example of each image; without SAM's labels there is no weight either."""
    probabilities = predict_probabilities(model, data.images)
    weight: Tensor | None = None
    if data.masks is not None and data.confidences is not None:
        sources = Sources(data.masks.long(), data.confidences.float() / 255, probabilities)
        weight = agree(sources, config=agreement_rule(config), state=state).weight

    def panel(values: Tensor | None, row: int) -> NDArray[Any] | None:
        return None if values is None else values[row].numpy()

    return [
        Example(
            caption=f"{data.name}, image {row + 1}",
            image=image.permute(1, 2, 0).contiguous().numpy(),
            truth=panel(data.truth, row),
            sam=panel(data.masks, row),
            prediction=probabilities[row].argmax(dim=0).byte().numpy(),
            weight=panel(weight, row),
        )
        for row, image in enumerate(data.images)
    ]


def _part(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]
