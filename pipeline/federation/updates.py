"""A round's updates, which wait in files until all have arrived, in the clients' order.

What a rule needs of them is read from the files piece by piece: a whole update, or one entry of all
updates in blocks of bounded size. Memory grows neither with the clients nor with their networks'
largest layer. A network has hundreds of small entries, so that numbers of one dtype lie behind each
other in a file, and are checked and summed as one tensor.
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

BLOCK = 1 << 22  # numbers of all updates together that are computed with at once


class Updates:
    """Files of updates to ``broadcast``, the weights that every client started from."""

    def __init__(self, folder: Path, broadcast: State) -> None:
        """Begin with an empty folder; what a killed run left there is removed."""
        self.broadcast = broadcast
        self._folder, self._weights = folder, dict[str, float]()
        self._names: dict[torch.dtype, list[str]] = {}  # of each dtype's entries, in order
        for name, value in broadcast.items():
            self._names.setdefault(value.dtype, []).append(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each client's update, in the order in which they came."""
        return dict(self._weights)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes of the entries."""
        return list(self._names)

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
        with naming(path), path.open("wb") as file:  # not durable: a round that stops is repeated
            for dtype in self._names:
                file.write(self.flat(update, dtype).numpy().data)
        self._weights[client] = weight

    def drop(self, client: str) -> None:
        """Forget a client's update."""
        del self._weights[client]

    def read(self, client: str) -> State:
        """Return a client's update."""
        update = State()
        for dtype in self._names:
            update |= self.entries(dtype, self.numbers(client, dtype))
        return {name: update[name] for name in self.broadcast}

    def numbers(self, client: str, dtype: torch.dtype) -> Tensor:
        """Return the numbers of all entries of a dtype in a client's update: (numbers,)."""
        return self._part(client, dtype, 0, self.numbers_of(dtype))

    def numbers_of(self, dtype: torch.dtype) -> int:
        """Return how many numbers the entries of a dtype have."""
        return sum(self.broadcast[name].numel() for name in self._names[dtype])

    def flat(self, state: State, dtype: torch.dtype) -> Tensor:
        """Return the numbers of a state's entries of a dtype: (numbers,)."""
        return torch.cat([state[name].reshape(-1) for name in self._names[dtype]])

    def entries(self, dtype: torch.dtype, numbers: Tensor) -> State:
        """Return as entries what ``flat`` and ``numbers`` give."""
        names = self._names[dtype]
        shapes = [self.broadcast[name].shape for name in names]
        parts = numbers.split([shape.numel() for shape in shapes])
        return {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield an entry of all updates, flat and in pieces: (updates, numbers), its own dtype."""
        old = self.broadcast[name]
        names = self._names[old.dtype]
        start = sum(self.broadcast[each].numel() for each in names[: names.index(name)])
        most = max(1, BLOCK // len(self))
        for first in range(start, start + old.numel(), most):
            count = min(most, start + old.numel() - first)
            yield torch.stack([self._part(each, old.dtype, first, count) for each in self._weights])

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder)

    def _part(self, client: str, dtype: torch.dtype, first: int, count: int) -> Tensor:
        """Read ``count`` of the numbers of a dtype."""
        start = first * dtype.itemsize
        for each in self._names:
            if each == dtype:
                break
            start += self.numbers_of(each) * each.itemsize
        path, kind = self._path(client), torch.empty(0, dtype=dtype).numpy().dtype
        with naming(path):
            return torch.from_numpy(np.fromfile(path, kind, count, offset=start))

    def _path(self, client: str) -> Path:
        return self._folder / f"{client}.update"
