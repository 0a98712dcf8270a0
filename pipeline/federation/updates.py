"""A round's updates, which wait in files until all have arrived, in the clients' order.

What a rule needs of them is read from the files piece by piece: a whole update, or one entry of all
updates in blocks of bounded size. Memory grows neither with the clients nor with their networks'
largest layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.disk import naming
from pipeline.segmentation.networks import State

BLOCK = 1 << 22  # numbers of all updates together that are read at once


class Updates:
    """Files of updates to ``broadcast``, the weights that every client started from."""

    def __init__(self, folder: Path, broadcast: State) -> None:
        """Begin with an empty folder; what a killed run left there is removed."""
        self.broadcast = broadcast
        self._folder, self._weights = folder, dict[str, float]()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each client's update, in the order in which they came."""
        return dict(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, client: str, update: State, weight: float) -> None:
        """Keep an update that ``check_update`` accepts, with a ``weight`` > 0.

        Raises:
            ValueError: the weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        path = self._path(client)
        with naming(path):  # not durable: a round that stops is repeated
            path.write_bytes(b"".join(update[name].numpy().tobytes() for name in self.broadcast))
        self._weights[client] = weight

    def drop(self, client: str) -> None:
        """Forget a client's update."""
        del self._weights[client]

    def read(self, client: str) -> State:
        """Return a client's update."""
        path, update = self._path(client), State()
        with naming(path):
            content = path.read_bytes()  # once: a network has hundreds of entries
        for name, start, old in self._entries():
            flat = np.frombuffer(content, old.numpy().dtype, old.numel(), start).copy()
            update[name] = torch.from_numpy(flat).reshape(old.shape)
        return update

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield an entry of all updates, flat and in pieces: (updates, numbers), its own dtype."""
        start, old = next((start, old) for found, start, old in self._entries() if found == name)
        most = max(1, BLOCK // len(self))
        for first in range(0, old.numel(), most):
            place, count = start + first * old.itemsize, min(most, old.numel() - first)
            yield torch.stack([self._numbers(each, place, count, old) for each in self._weights])

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder)

    def _entries(self) -> Iterator[tuple[str, int, Tensor]]:
        start = 0
        for name, old in self.broadcast.items():
            yield name, start, old
            start += old.nbytes

    def _numbers(self, client: str, start: int, count: int, like: Tensor) -> Tensor:
        path = self._path(client)
        with naming(path):
            return torch.from_numpy(np.fromfile(path, like.numpy().dtype, count, offset=start))

    def _path(self, client: str) -> Path:
        return self._folder / f"{client}.update"
