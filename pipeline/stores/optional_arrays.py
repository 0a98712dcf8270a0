"""What a label store holds beside its labels where the settings ask for it, and how it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StageError
from pipeline.stores.arrays import Bytes
from pipeline.stores.label_store import LabelStore
from pipeline.stores.pseudo_labels import PROBABILITIES, VIEW_AGREEMENT


def has_probabilities(store: LabelStore) -> bool:
    """Return whether a store keeps the probabilities of every class."""
    return PROBABILITIES in store.arrays


def read_view_agreement(path: Path) -> NDArray[np.float32]:
    """Read the mean Dice of each view's label with the stored one: (N,) float32, 0..1.

    NaN where the labels are of one view.

    Raises:
        StageError: a row is not done. CorruptStoreError: a row is missing or damaged.
    """
    store = LabelStore(path)
    store.check_finished()
    if VIEW_AGREEMENT not in store.arrays:
        return np.full(len(store), np.nan, np.float32)
    found: NDArray[np.float32] = store.read_arrays([VIEW_AGREEMENT], range(len(store)))[
        VIEW_AGREEMENT
    ]
    return found


def read_probabilities(path: Path, rows: range) -> NDArray[np.float32]:
    """Read the probabilities of every class in some rows: (n, K+1, S, S) float32, 0..1.

    They are stored in steps of 1/255, each rounded by itself: a pixel's may miss one by (K+1)/510.
    Errors as ``read_levels``'s.
    """
    return read_levels(path, rows).astype(np.float32) / np.float32(255)


def read_levels(path: Path, rows: range) -> Bytes:
    """Read them as they are stored: (n, K+1, S, S) uint8, 255 for a probability of 1.

    Raises:
        StageError: the store has none, or a row is not done. CorruptStoreError: a row is missing or
        damaged.
    """
    store = LabelStore(path)
    store.check_finished()
    if not has_probabilities(store):
        raise StageError(
            f"{path}: found no class probabilities; run `samfed precompute-sam` with "
            "precompute.probabilities=true"
        )
    levels: Bytes = store.read_arrays([PROBABILITIES], rows)[PROBABILITIES]
    return levels
