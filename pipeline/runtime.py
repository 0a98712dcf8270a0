"""What torch runs on: its device, its threads, and torchvision beside a CPU-only torch.

Import this module before torchvision, which segment-anything, timm and smp import. The package
index builds torchvision against the CUDA build of torch; beside a CPU-only torch its compiled
operators do not load, and its import fails with ``operator torchvision::nms does not exist``: it
registers a meta kernel for an operator that nobody declared. Declaring the two schemas that it
names is enough for the import. samfed never calls these operators.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import ConfigError


def _compiled_operators_load() -> bool:
    """Load torchvision's compiled operators the way torchvision itself does; False if it cannot."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # the coming import says plainly that torchvision is missing
    libraries = list(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


# Only Linux has separate CPU and CUDA builds under one version number. The library object is kept
# for the life of the process: torch forgets the schemas when it is collected.
_declared: torch.library.Library | None = None
if sys.platform == "linux" and "torchvision" not in sys.modules and not _compiled_operators_load():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: the name is no device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: found '{name}', expected auto, cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device: '{name}' asked for, but torch finds {count or 'no'} CUDA device(s), numbered "
            "from 0; use auto"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 is fast there: a GPU that has it, or a CPU with AMX or AVX512-bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    fast = able.get("amx_bf16") or able.get("avx512_bf16")
    return bool(fast and torch.backends.mkldnn.is_available())


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Pin torch's threads on the CPU (None: leave them): equal counts give equal bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def visible_gpus() -> list[str]:
    """Return this process's GPUs by the names that it was given, e.g. by SLURM."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
