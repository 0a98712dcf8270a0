"""Test images that a page shows: each client's worst, median and best, with truth and prediction.

``samfed evaluate``, which has them, keeps small pictures of them for ``samfed report``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.errors import StageError
from pipeline.results.scores import Score
from pipeline.stores.plain_data import load, save

FILE = "gallery.safetensors"
SIDE = 160  # px of a picture; images of a smaller frame stay as they are
MAX_CLIENTS = 12  # of whom pictures are kept: a page with more is not read
RANKS = ("worst", "median", "best")


@dataclass(frozen=True)
class GalleryImage:
    """One test image, with the names by which it is found again."""

    client: str
    image_id: str
    rank: str  # among the client's: worst, median or best by Dice
    dice: float  # 0..1
    hd95: float  # px of the client's frame
    image: NDArray[Any]  # (s, s, 3) uint8 RGB
    truth: NDArray[Any]  # (s, s) uint8 class index, 0 = background
    prediction: NDArray[Any]  # (s, s) uint8 likewise, of the final model


def choose(
    scores: Sequence[Score],
    images: NDArray[np.uint8],
    truths: NDArray[np.uint8],
    predictions: NDArray[np.uint8],
) -> list[GalleryImage]:
    """Return a client's worst, median and best image by Dice; fewer where it has fewer.

    Args:
        scores: of its N test images. images: (N, S, S, 3). truths, predictions: (N, S, S).
    """
    order = np.argsort([score.metrics.dice for score in scores], kind="stable")
    places = {"worst": 0, "median": (len(order) - 1) // 2, "best": len(order) - 1}
    chosen = {int(order[place]): rank for rank, place in reversed(places.items())}
    return [
        GalleryImage(
            client=scores[index].client,
            image_id=scores[index].image_id,
            rank=rank,
            dice=scores[index].metrics.dice,
            hd95=scores[index].metrics.hd95,
            image=_shrink(images[index], Image.Resampling.BOX),
            truth=_shrink(truths[index], Image.Resampling.NEAREST),
            prediction=_shrink(predictions[index], Image.Resampling.NEAREST),
        )
        for index, rank in sorted(chosen.items(), key=lambda each: RANKS.index(each[1]))
    ]


def _shrink(pixels: NDArray[np.uint8], how: Image.Resampling) -> NDArray[np.uint8]:
    side = min(SIDE, len(pixels))
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), how))


def save_gallery(path: Path, images: Iterable[GalleryImage]) -> None:
    """Write the pictures of at most ``MAX_CLIENTS`` clients: from the worst to the best.

    They are ranked by their worst image and taken evenly; the same images give the same bytes.
    """
    found = list(images)
    clients = list(dict.fromkeys(each.client for each in sorted(found, key=lambda i: i.dice)))
    places = np.linspace(0, len(clients) - 1, min(MAX_CLIENTS, len(clients))).round().astype(int)
    kept = {clients[place] for place in places}
    save(path, [each for each in found if each.client in kept])


def load_gallery(path: Path) -> list[GalleryImage]:
    """Read what ``save_gallery`` wrote.

    Raises:
        StageError: there is none. CorruptStoreError: its bytes are not what was written.
    """
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed evaluate` first")
    found = load(path, list[dict[str, str | float | Tensor]], stage="evaluate")
    return [GalleryImage(**{name: _plain(value) for name, value in each.items()}) for each in found]


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value
