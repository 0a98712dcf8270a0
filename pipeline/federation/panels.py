"""Making example images: of D_p where the model is, and of a client at the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import AgreementState, Calibration, agree
from pipeline.federation.examples import Example
from pipeline.federation.targets import agreement_rule, sources_of
from pipeline.federation.views import ClientData, PublicSet
from pipeline.segmentation.networks import predict_masks

_PUBLIC_EXAMPLES = 4
_CLIENT_EXAMPLES = 1


def public_examples(
    model: nn.Module, public: PublicSet, calibration: Calibration, *, config: Config
) -> list[Example]:
    """Return the first images of D_p's calibration part, where the truth is known."""
    initial = AgreementState.initial(config.data.num_classes)
    shown = public.calibration.first(_PUBLIC_EXAMPLES)
    return _examples(model, shown, replace(initial, calibration=calibration), config)


def client_examples(
    model: nn.Module, client: ClientData, state: AgreementState, *, config: Config
) -> list[Example]:
    """Return a client's first training image, as the rounds worked with it.

    Its truth is shown only where the method trains on it, not where an audit scores against it.
    """
    shown = replace(client.first(_CLIENT_EXAMPLES), truth=None)
    if shown.confidences is None:
        shown = replace(shown, truth=shown.masks, masks=None)
    return _examples(model, shown, state, config)


def _examples(
    model: nn.Module, shown: ClientData, state: AgreementState, config: Config
) -> list[Example]:
    """Return an example of each image; without SAM's labels there is no weight either."""
    weight: Tensor | None = None
    if shown.masks is not None:
        sources = sources_of(model, shown)
        weight = agree(sources, config=agreement_rule(config), state=state).weight

    def panel(values: Tensor | None, row: int) -> NDArray[Any] | None:
        return None if values is None else values[row].numpy()

    return [
        Example(
            caption=f"{shown.name}, image {row + 1}",
            image=shown.images[row].permute(1, 2, 0).contiguous().numpy(),
            truth=panel(shown.truth, row),
            sam=panel(shown.masks, row),
            prediction=mask.numpy(),
            weight=panel(weight, row),
        )
        for row, mask in enumerate(predict_masks(model, shown.images))
    ]
