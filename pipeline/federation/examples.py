"""Example images of a run's last round: truth, SAM's label, prediction, and a pixel's target.

They are made where the images are, of D_p at the server and of a client at the client, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.federation.agreement import Calibration, agree
from pipeline.federation.targets import agreement_rule, calibration_at_site, sources_of
from pipeline.federation.views import ClientData, PublicSet
from pipeline.segmentation.networks import predict_masks
from pipeline.stores.plain_data import load, save

_PUBLIC_EXAMPLES = 4
_CLIENT_EXAMPLES = 1


@dataclass(frozen=True)
class Example:
    """One image of S x S px with everything that is known of it; None is not known."""

    caption: str
    image: NDArray[Any]  # (S, S, 3) uint8 RGB
    truth: NDArray[Any] | None  # (S, S) uint8 class index, 0 = background
    sam: NDArray[Any] | None  # (S, S) uint8 likewise: SAM's label
    prediction: NDArray[Any]  # (S, S) uint8 likewise, of the final model
    # (S, S) float32 0..1, the chance of foreground in a pixel's target, 1/2 where it has no weight
    target: NDArray[Any] | None = None


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``examples`` atomically; the same ones give the same bytes."""
    save(path, examples)


def load_examples(path: Path) -> list[Example]:
    """Read what ``save_examples`` wrote.

    Raises:
        CorruptStoreError: its bytes are not what was written.
    """
    found = load(path, list[dict[str, str | Tensor | None]])
    known = {field.name for field in fields(Example)}  # before version 9 there was a weight
    return [Example(**{k: _array(v) for k, v in each.items() if k in known}) for each in found]


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def public_examples(
    model: nn.Module, public: PublicSet, calibration: Calibration, *, config: Config
) -> list[Example]:
    """Return the first images of D_p's calibration part, where the truth is known."""
    shown = public.calibration.first(_PUBLIC_EXAMPLES)
    return _examples(model, shown, calibration, config)


def client_examples(
    model: nn.Module, client: ClientData, calibration: Calibration, *, config: Config
) -> list[Example]:
    """Return a client's first training image, as the rounds worked with it.

    Its truth is shown only where the method trains on it, not where an audit scores against it.
    """
    shown = replace(client.first(_CLIENT_EXAMPLES), truth=None)
    if shown.confidences is None:
        shown = replace(shown, truth=shown.masks, masks=None)
    if shown.masks is not None:
        calibration = calibration_at_site(model, client.images, calibration, config)
    return _examples(model, shown, calibration, config)


def _examples(
    model: nn.Module, shown: ClientData, calibration: Calibration, config: Config
) -> list[Example]:
    """Return an example of each image; without SAM's labels there is no target either."""
    target: Tensor | None = None
    if shown.masks is not None:
        sources = sources_of(model, shown)
        made = agree(sources, config=agreement_rule(config), calibration=calibration)
        target = torch.where(made.weight > 0, made.foreground, 0.5)

    def panel(values: Tensor | None, row: int) -> NDArray[Any] | None:
        return None if values is None else values[row].numpy()

    return [
        Example(
            caption=f"{shown.name}, image {row + 1}",
            image=shown.images[row].permute(1, 2, 0).contiguous().numpy(),
            truth=panel(shown.truth, row),
            sam=panel(shown.masks, row),
            prediction=mask.numpy(),
            target=panel(target, row),
        )
        for row, mask in enumerate(predict_masks(model, shown.images))
    ]
