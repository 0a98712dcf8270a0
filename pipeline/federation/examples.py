"""Example images of a run's last round: truth, SAM's label, prediction, and a pixel's weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from pipeline.stores.plain_data import load, save


@dataclass(frozen=True)
class Example:
    """One image of S x S px with everything that is known of it; None is not known."""

    caption: str
    image: NDArray[Any]  # (S, S, 3) uint8 RGB
    truth: NDArray[Any] | None  # (S, S) uint8 class index, 0 = background
    sam: NDArray[Any] | None  # (S, S) uint8 likewise: SAM's label
    prediction: NDArray[Any]  # (S, S) uint8 likewise, of the final model
    weight: NDArray[Any] | None  # (S, S) float32 0..1, how much a pixel's pseudo-label counts


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``examples`` atomically; the same ones give the same bytes."""
    save(path, examples)


def load_examples(path: Path) -> list[Example]:
    """Read what ``save_examples`` wrote.

    Raises:
        CorruptStoreError: its bytes are not what was written.
    """
    found = load(path, list[dict[str, str | Tensor | None]])
    return [Example(**{name: _array(value) for name, value in each.items()}) for each in found]


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value
