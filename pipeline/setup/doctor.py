"""``samfed doctor``: whether this machine, these settings and this data will do, a line each."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pipeline import __version__
from pipeline.config import Config
from pipeline.cores import usable_cores
from pipeline.data.folder import InputFolder, scan
from pipeline.data.images import read_image
from pipeline.data.masks import read_mask
from pipeline.disk import leftovers, unlock, write_bytes, writer_lock
from pipeline.errors import SamfedError
from pipeline.runtime import has_fast_bf16, resolve_device
from pipeline.sam.build import build_sam
from pipeline.sam.checkpoints import base_checkpoint
from pipeline.sam.providers import failing_providers
from pipeline.sam.teacher import resolve_precision
from pipeline.segmentation.networks import build_model
from pipeline.setup.fit import check_networks, traps

_LIBRARIES = ("torch", "torchvision", "zarr", "dask", "timm")
_LOOKED_AT = 16  # images that are decoded; `samfed prepare` decodes all
_WRITTEN_BYTES = 8 * 2**20
_SCARCE_BYTES, _TOO_FEW_BYTES = 5 * 10**9, 10**8
_SLOW_MB_S = 20

Kind = Literal["ok", "skipped", "warning", "problem"]
Lines = Iterator[tuple[Kind, str]]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, or skipped; what is no ``ok`` says what to do."""

    kind: Kind
    what: str
    text: str


@dataclass(frozen=True)
class DoctorResult:
    """What ``samfed doctor`` found."""

    findings: tuple[Finding, ...]
    exit_code: int = 1  # of problems

    def text(self) -> str:
        """Return a line for each finding."""
        return "\n".join(f"{each.kind:8} {each.what}: {each.text}" for each in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the findings, and how many of each kind there are."""
        kinds = [each.kind for each in self.findings]
        count = {kind: kinds.count(kind) for kind in get_args(Kind)}
        return {**count, "findings": [asdict(each) for each in self.findings]}

    def failures(self) -> list[str]:
        """Return the problems, which make the exit code 1."""
        return [f"{each.what}: {each.text}" for each in self.findings if each.kind == "problem"]


def examine(config: Config) -> DoctorResult:
    """Look at versions, devices, disk, locks, data, networks and checkpoints; change nothing."""
    return examined({what: partial(check, config) for what, check in CHECKS.items()})


def examined(checks: Mapping[str, Callable[[], Lines]]) -> DoctorResult:
    """Return what checks find, by their names; one that fails is a problem."""
    findings = []
    for what, check in checks.items():
        try:
            findings += [Finding(kind, what, text) for kind, text in check()]
        except SamfedError as error:
            findings.append(Finding("problem", what, str(error)))
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            reason = error.strerror or str(error)
            text = f"{where}{reason}; check the path and its permissions"
            findings.append(Finding("problem", what, text))
    return DoctorResult(tuple(findings))


# --------------------------------------------------------------------------- the machine


def _versions(_: Config) -> Lines:
    listed = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    yield "ok", f"samfed {__version__}, Python {platform.python_version()}, {listed}"


def _devices(config: Config) -> Lines:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield "ok", f"cuda:{index} {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if not count:
        yield "ok", "no CUDA device; everything runs on the CPU"
    for section in ("sam", "precompute", "federate"):
        resolve_device(getattr(config, section).device)


def _onnx(config: Config) -> Lines:
    wanted = config.precompute.backend == "onnx"
    for provider, reason in failing_providers().items():
        if reason is None:
            yield "ok", f"{provider} runs"
        else:
            advice = "install the CUDA and cuDNN versions it needs, or use precompute.backend=torch"
            yield "problem" if wanted else "warning", f"{provider}: {reason}; {advice}"


def _precision(config: Config) -> Lines:
    run = config.precompute
    device = resolve_device(run.device)
    taken = resolve_precision(run.precision, device, config.sam.variant)
    yield "ok", f"precompute.precision {run.precision} takes {taken} on {device.type}"
    if config.federate.precision == "bf16":
        rounds = resolve_device(config.federate.device)
        if not has_fast_bf16(rounds):
            advice = "rounds become slower; use federate.precision=fp32"
            yield "warning", f"bfloat16 is emulated on this {rounds.type}: {advice}"


def _threads(config: Config) -> Lines:
    cores, wanted = usable_cores(), config.federate.threads
    if wanted > cores:
        yield "warning", f"federate.threads is {wanted}, but there are {cores} cores; lower it"
    else:
        yield "ok", f"{cores} cores, {torch.get_num_threads()} torch threads, {wanted} in a round"


# --------------------------------------------------------------------------- the disk


def _disk(config: Config) -> Lines:
    """Write 8 MiB durably, and take a lock, in the folder that has or would hold the cache."""
    root = config.cache.root.resolve()
    place = next(path for path in (root, *root.parents) if path.exists())
    with tempfile.TemporaryDirectory(prefix=".samfed-doctor-", dir=place) as name:
        start = time.perf_counter()
        write_bytes(Path(name) / "speed", os.urandom(_WRITTEN_BYTES))
        speed = _WRITTEN_BYTES / 1e6 / (time.perf_counter() - start)
        start = time.perf_counter()
        write_bytes(Path(name) / "small", b"")
        wait = time.perf_counter() - start
        with writer_lock(Path(name) / "lock"):
            pass
    free = shutil.disk_usage(place).free
    text = f"{place}: {free / 1e9:.1f} GB free, {speed:.0f} MB/s, {wait * 1e3:.1f} ms a small file"
    if free < _TOO_FEW_BYTES:
        yield "problem", f"{text}; make room, or set cache.root to another disk"
    elif free < _SCARCE_BYTES or speed < _SLOW_MB_S:
        yield "warning", f"{text}; a roomier or faster disk for cache.root would help"
    else:
        yield "ok", text


def _locks(config: Config) -> Lines:
    root = config.cache.root
    held = unlock(root / "locks", clear=False).holders
    for path, holder in held.items():
        yield "warning", f"{path}: {holder}; if it is dead, run `samfed cache unlock --yes`"
    files = leftovers(root)
    if files:
        yield "warning", f"{len(files)} files that killed runs left; run `samfed cache prune`"
    if not held and not files:
        yield "ok", "none left behind"


# --------------------------------------------------------------------------- the settings


def _data(config: Config) -> Lines:
    folder = scan(config.data.root, mask_pattern=config.data.mask_pattern)
    looked = _decode_some(config, folder)
    yield "ok", f"{config.data.root}: {folder.text()}; looked at {looked} of them"


def _decode_some(config: Config, folder: InputFolder) -> int:
    """Decode images from all over the folder with their masks; return how many."""
    files = list(folder.images.values())
    some = files[:: max(1, len(files) // _LOOKED_AT)]
    root, classes = config.data.root, config.data.num_classes
    for each in some:
        image = read_image(root / each.image)
        if each.mask is not None:
            size, turned = image.pixels.shape[:2], image.orientation
            mask = root / each.mask
            read_mask(mask, size_hw=size, num_classes=classes, image_orientation=turned)
    return len(some)


def _networks(config: Config) -> Lines:
    check_networks(config)
    for network in (config.model, *config.model.clients):
        if network.encoder_weights is not None:
            build_model(config, seed=0, network=network)
    yield "ok", f"{1 + len(config.model.clients)} built"


def _teacher(config: Config) -> Lines:
    path, _ = base_checkpoint(config.sam)
    if config.sam.variant.startswith("timm:"):
        build_sam(config.sam.variant, input_size=config.sam.input_size)
    yield "ok", f"{config.sam.variant}, {path or 'random weights'}"


def _traps(config: Config) -> Lines:
    found = traps(config)
    yield from (("warning", line) for line in found)
    if not found:
        yield "ok", "no trap found"


CHECKS: dict[str, Callable[[Config], Lines]] = {
    "versions": _versions,
    "device": _devices,
    "onnx": _onnx,
    "precision": _precision,
    "threads": _threads,
    "disk": _disk,
    "locks": _locks,
    "data": _data,
    "networks": _networks,
    "teacher": _teacher,
    "settings": _traps,
}
