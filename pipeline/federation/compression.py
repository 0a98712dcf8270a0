"""Weights in few bytes: kernels as float16 or int8, everything else as it is.

A network's kernels (float entries of two or more dimensions) are some 97 % of its numbers. Biases,
normalisation layers, batch norm's statistics and counters travel exactly.

Clients send what they changed, and keep what rounding left out for their next update (error
feedback; Seide et al., 2014; Karimireddy et al., 2019). The server sends whole weights, and keeps
them exactly, so that its rounding does not add up over the rounds.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Compression
from pipeline.stores.plain_data import Plain, State

#: int8's steps to the root mean square of a row. An update's rounding is made up for later.
WEIGHT_STEPS, UPDATE_STEPS = 32, 16
_LARGEST = 127  # of int8, either sign
_FLOAT16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Packed(Plain):
    """Weights, or an update of them, in few bytes."""

    kernels: Tensor  # in the order of their names: float16, or int8 as deflated bytes (uint8)
    steps: Tensor  # float32, of int8: one for each row of each kernel; else empty
    others: State  # exact weights, in an update too


def kernels_of(weights: State) -> list[str]:
    """Return the names of the entries that are packed, in order."""
    names = (name for name, value in weights.items() if value.is_floating_point())
    return sorted(name for name in names if weights[name].ndim > 1)


def pack(weights: State, kind: Compression, *, steps: int) -> Packed:
    """Return weights with their kernels as ``kind``, which is not ``none``.

    ``float16`` is clamped to its range. ``int8`` counts steps, which are the root mean square of
    a kernel's row (an output channel) over ``steps``, or as much more as keeps its largest number
    within 127 of them. Small counts are frequent, so that Huffman's code shortens them.
    """
    names = kernels_of(weights)
    others = {name: value for name, value in weights.items() if name not in names}
    if kind == "float16":
        flat = [weights[name].reshape(-1).clamp(_FLOAT16.min, _FLOAT16.max) for name in names]
        return Packed(torch.cat([*flat, torch.zeros(0)]).half(), torch.zeros(0), others)
    sizes, counts = [torch.zeros(0)], [b""]
    for name in names:
        rows = weights[name].reshape(len(weights[name]), -1).double()
        largest = rows.abs().amax(dim=1)
        step = (rows.square().mean(dim=1).sqrt() / steps).maximum(largest / _LARGEST).float()
        # where float32 rounded the step down or to 0, the largest numbers would leave the range
        exact = rows / step.double().clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
        counts.append(exact.round().clamp(-_LARGEST, _LARGEST).to(torch.int8).numpy().tobytes())
        sizes.append(step)
    # Huffman's code alone: there is nothing to repeat in weights
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    content = coder.compress(b"".join(counts)) + coder.flush()
    return Packed(_bytes(content), torch.cat(sizes), others)


def unpack(packed: Packed, like: State) -> State:
    """Return packed weights, with kernels of the shapes and dtypes of ``like``.

    Raises:
        ValueError: the kernels are not as many numbers as those of ``like``.
    """
    names = kernels_of(like)
    numbers, rows = sum(like[n].numel() for n in names), sum(len(like[n]) for n in names)
    if packed.kernels.dtype == torch.float16:
        flat, steps = packed.kernels, torch.ones(rows)
    else:
        flat, steps = _inflated(packed.kernels, numbers), packed.steps
    if flat.shape != (numbers,) or steps.shape != (rows,):
        found = f"{flat.numel()} numbers in kernels of {steps.numel()} rows"
        raise ValueError(f"it has {found}, expected {numbers} in {rows}")
    weights, number, row = dict(packed.others), 0, 0
    for name in names:
        shape, size, count = like[name].shape, like[name].numel(), len(like[name])
        values = flat[number : number + size].reshape(count, -1).double()
        values = values * steps[row : row + count].double().unsqueeze(1)
        weights[name] = values.reshape(shape).to(like[name].dtype)
        number, row = number + size, row + count
    return weights


def pack_update(
    after: State, before: State, residual: State, kind: Compression
) -> tuple[Packed, State]:
    """Return what a client did to the weights that it received, and its new residual.

    Args:
        residual: what is missing of the client's updates so far; empty before its first.
    """
    names = kernels_of(before)
    wanted = {n: after[n] - before[n] + residual.get(n, torch.zeros(())) for n in names}
    packed = pack({**after, **wanted}, kind, steps=UPDATE_STEPS)
    sent = unpack(packed, before)
    return packed, {name: wanted[name] - sent[name] for name in names}


def unpack_update(packed: Packed, before: State) -> State:
    """Return the weights that a client's update makes of those before it.

    Raises:
        ValueError: as ``unpack``.
    """
    update = unpack(packed, before)
    return update | {name: before[name] + update[name] for name in kernels_of(before)}


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _inflated(content: Tensor, numbers: int) -> Tensor:
    """Return int8 numbers; no more than there should be and one are ever in memory."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(content.numpy().tobytes(), numbers + 1)
    except zlib.error as error:
        raise ValueError(f"its kernels are damaged ({error})") from error
    return torch.from_numpy(np.frombuffer(found, np.int8).copy())
