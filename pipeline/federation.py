"""Stage two, ``samfed federate``: rounds of local updates and averaging. Never loads SAM."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.aggregation import FedAvg, first_not_finite
from pipeline.agreement import AgreementState
from pipeline.card import CARD_FILE, load_card
from pipeline.config import AGREEMENT_METHODS, SAM_METHODS, Config
from pipeline.devices import resolve_device
from pipeline.engines import run_in_process, torch_threads
from pipeline.errors import SamfedError
from pipeline.files import file_sha256
from pipeline.metrics import dice_score
from pipeline.models import State, build_model, predict_masks
from pipeline.partition import Partition, load_partition
from pipeline.runs import Checkpoint, RunFolder, load_state, save_state
from pipeline.stores.images import ImageSet, read_image_store
from pipeline.stores.labels import Identity, Labels, LabelStore, read_labels
from pipeline.training import (
    ClientData,
    LocalResult,
    ServerData,
    cosine,
    local_update,
    train_on_server,
)

log = logging.getLogger("samfed.federation")

Progress = Callable[[str, int, int], None]

_DECIDING_MODULES = (
    "aggregation",
    "agreement",
    "augment",
    "federation",
    "losses",
    "models",
    "training",
)


@dataclass(frozen=True)
class Federation:
    """Everything a run reads, in memory."""

    server: ServerData
    clients: tuple[ClientData, ...]
    validation: dict[str, ImageSet]  # of each client that has one; for reports only
    fingerprint: str  # of the parameters and data that decide the result


def federate(config: Config, *, mode: str = "auto", progress: Progress | None = None) -> RunFolder:
    """Run all rounds of ``config.federate.method`` and write ``cache/runs/<name>/``.

    A run with the same parameters and data continues after its last finished round, and ends with
    the same bytes as if it had never stopped.

    Args:
        mode: ``auto`` (continue or begin), ``resume`` (only continue) or ``restart``.

    Raises:
        StageError: an earlier stage is missing. SamfedError: no client sent a usable update.
    """
    data = load_federation(config)
    cache = config.cache.root
    run = RunFolder(cache / "runs" / config.federate.name)
    notice = run.begin(config, data.fingerprint, mode=mode, aside=cache / "aside" / "runs")
    if notice:
        log.warning(notice)
    with torch_threads(config.federate.threads):
        _run(config, data, run, progress)
    return run


def load_federation(config: Config) -> Federation:
    """Read the image stores and, for the methods that use SAM, the finished label stores."""
    partition = load_partition(config.cache.root / "partition.json")
    train = _read_images(config, "server", "train", partition.server.train)
    calibration = _read_images(config, "server", "calibration", partition.server.calibration)
    identity = _expected_identity(config) if config.federate.method in SAM_METHODS else None
    masks = confidences = None
    if identity is not None:
        labels = _read_sam(config, partition, "server", partition.server.calibration, identity)
        masks, confidences = torch.from_numpy(labels.masks), torch.from_numpy(labels.confidences)
    server = ServerData(
        images=_images(train),
        labels=_labels(train),
        calibration_images=_images(calibration),
        calibration_labels=_labels(calibration),
        calibration_groups=tuple(
            partition.images[image_id].group for image_id in partition.server.calibration
        ),
        calibration_masks=masks,
        calibration_confidences=confidences,
    )
    clients = tuple(
        _load_client(config, partition, name, number, identity)
        for number, name in enumerate(partition.clients)
    )
    validation = {
        name: _read_images(config, name, "val", part.val)
        for name, part in partition.clients.items()
        if part.val
    }
    fingerprint = _fingerprint(config, identity)
    return Federation(server, clients, validation, fingerprint)


def _expected_identity(config: Config) -> Identity:
    """Whose labels the run asks for: the teacher's; the server's where no teacher is at hand."""
    teacher = config.cache.root / "teacher"
    if (teacher / CARD_FILE).is_file():
        return load_card(teacher).identity(label_size=config.data.image_size)
    return LabelStore(config.cache.root / "sam" / "server.zarr").identity


def _read_images(config: Config, owner: str, split: str, ids: Sequence[str]) -> ImageSet:
    path = config.cache.root / "images" / owner / f"{split}.zarr"
    return read_image_store(path, image_ids=ids, size=config.data.image_size)


def _read_sam(
    config: Config, partition: Partition, owner: str, ids: Sequence[str], identity: Identity
) -> Labels:
    path = config.cache.root / "sam" / f"{owner}.zarr"
    return read_labels(path, rows=partition.row_keys(ids), identity=identity)


def _load_client(
    config: Config, partition: Partition, name: str, number: int, identity: Identity | None
) -> ClientData:
    method, ids = config.federate.method, partition.clients[name].train
    images = _images(_read_images(config, name, "train", ids))
    if method == "oracle":
        truth = read_image_store(
            config.cache.root / "oracle" / f"{name}.zarr",
            image_ids=ids,
            size=config.data.image_size,
            stage="prepare --with-oracle",
        )
        return ClientData(name, images, masks=_labels(truth))
    if identity is None:
        return ClientData(name, images)
    labels = _read_sam(config, partition, name, ids, identity)
    rows: NDArray[np.int64] = np.arange(len(images))
    if method == "shuffled":  # the control: real labels, of the wrong images
        rows = np.random.default_rng([config.seed, 2, number]).permutation(len(images))
    return ClientData(
        name,
        images,
        masks=torch.from_numpy(labels.masks[rows]),
        confidences=torch.from_numpy(labels.confidences[rows]),
    )


def _images(stored: ImageSet) -> Tensor:
    return torch.from_numpy(stored.images).permute(0, 3, 1, 2).contiguous()


def _labels(stored: ImageSet) -> Tensor:
    if stored.labels is None:
        raise SamfedError("a labelled part has no labels in its store; run `samfed prepare` again")
    return torch.from_numpy(stored.labels)


def _fingerprint(config: Config, identity: Identity | None) -> str:
    """sha256 over all that decides the result; where the run lies and runs is left out."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    chosen = {name: settings[name] for name in ("seed", "data", "model", "agreement", "federate")}
    del chosen["data"]["root"], chosen["federate"]["name"]
    chosen["partition"] = file_sha256(config.cache.root / "partition.json")
    chosen["labels"] = identity.digest if identity is not None else None
    chosen["code"] = _code_digest()
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------- rounds


def _run(config: Config, data: Federation, run: RunFolder, progress: Progress | None) -> None:
    settings = config.federate
    device = resolve_device(settings.device)
    model = build_model(config.model, num_classes=config.data.num_classes, seed=config.seed)
    model.to(device)
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        weights = _server_start(config, data, model, progress)
        states = {c.name: AgreementState.initial(config.data.num_classes) for c in data.clients}
        checkpoint = Checkpoint(0, weights, _pack(states))
        run.save_checkpoint(checkpoint, data.fingerprint)
    for number in range(checkpoint.round + 1, settings.rounds + 1):
        began = time.perf_counter()
        weights, states, entry = _round(config, data, model, checkpoint, number)
        entry["val"] = _validate(model, weights, data.validation, config.data.num_classes)
        entry["seconds"] = round(time.perf_counter() - began, 3)
        checkpoint = Checkpoint(number, weights, _pack(states))
        run.append_history(entry)
        run.save_checkpoint(checkpoint, data.fingerprint)
        for warning in entry["warnings"]:
            log.warning("round %d: %s", number, warning)
        if progress is not None:
            progress(f"{settings.method}: rounds", number, settings.rounds)
    run.finish(checkpoint.weights)


def _server_start(
    config: Config, data: Federation, model: nn.Module, progress: Progress | None
) -> State:
    """The first global model; made once for all runs whose settings that decide it are equal."""
    steps = config.federate.start_steps
    kept = config.cache.root / "starts" / f"{_start_key(config)}.safetensors"
    if kept.is_file():
        return load_state(kept)

    def advance(step: int) -> None:
        if progress is not None:
            progress(f"{config.federate.method}: server start", step, steps)

    state = train_on_server(
        model, data.server, config=config.federate, seed=config.seed, progress=advance
    )
    save_state(kept, state)
    return state


def _code_digest() -> str:
    """sha256 over the modules that decide a round: other code may not continue a run."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in _DECIDING_MODULES:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _start_key(config: Config) -> str:
    """sha256 over what decides the server start, first 16 hexadecimal digits."""
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    used = ("start_steps", "labelled_batch", "learning_rate", "weight_decay", "threads", "device")
    chosen = {
        "seed": config.seed,
        "data": {key: settings["data"][key] for key in ("num_classes", "image_size")},
        "model": settings["model"],
        "federate": {key: settings["federate"][key] for key in used},
        "partition": file_sha256(config.cache.root / "partition.json"),
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _round(
    config: Config, data: Federation, model: nn.Module, before: Checkpoint, number: int
) -> tuple[State, dict[str, AgreementState], dict[str, Any]]:
    """One round: every client's local update, then the average in client order."""
    settings = config.federate
    ramp = min(1.0, number / settings.ramp_rounds) if settings.ramp_rounds else 1.0
    unlabelled_weight = settings.unlabelled_weight * ramp
    rate = settings.learning_rate * cosine(number - 1, settings.rounds)

    def update(index: int) -> LocalResult:
        client = data.clients[index]
        return local_update(
            model,
            before.weights,
            client,
            data.server,
            AgreementState(before.client_states[client.name]),
            config=settings,
            agreement=config.agreement,
            learning_rate=rate,
            unlabelled_weight=unlabelled_weight,
            seed=client_seed(config.seed, number, index),
        )

    mean = FedAvg()
    states = {c.name: AgreementState(before.client_states[c.name]) for c in data.clients}
    clients: dict[str, Any] = {}
    warnings: list[str] = []
    for client, result in zip(
        data.clients, run_in_process(update, range(len(data.clients))), strict=True
    ):
        clients[client.name] = {"images": result.images, **result.diagnostics}
        broken = first_not_finite(result.weights)
        if broken is not None:
            warnings.append(f"{client.name}: update rejected, '{broken}' is not finite")
            continue
        mean.add(result.weights, result.images)
        states[client.name] = result.state
        warnings += _floors(config, client.name, result)
    if len(warnings) and all("rejected" in w for w in warnings) and len(warnings) == len(clients):
        raise SamfedError(
            f"round {number}: no client sent a usable update ({warnings[0]}); "
            "lower federate.learning_rate"
        )
    entry = {
        "round": number,
        "unlabelled_weight": unlabelled_weight,
        "learning_rate": rate,
        "clients": clients,
        "warnings": warnings,
    }
    return mean.result(), states, entry


def client_seed(seed: int, number: int, index: int) -> int:
    """Seed of a client's round: independent streams, whatever order clients run in."""
    return int(np.random.SeedSequence([seed, 3, number, index]).generate_state(1)[0])


def _floors(config: Config, name: str, result: LocalResult) -> list[str]:
    """Warnings for a client whose agreement with SAM, or share of kept pixels, is poor."""
    if config.federate.method not in AGREEMENT_METHODS:
        return []
    found = []
    for key, floor, meaning in (
        ("agreement", config.agreement.warn_agreement, "foreground Dice of SAM and client"),
        ("kept", config.agreement.warn_kept, "share of pixels kept"),
    ):
        value = result.diagnostics[key]
        if value is not None and value < floor:
            found.append(f"{name}: {meaning} is {value:.2f}, below {floor:.2f}")
    return found


def _validate(
    model: nn.Module, weights: State, validation: dict[str, ImageSet], num_classes: int
) -> dict[str, Any]:
    """Mean Dice of the averaged model on the validation parts: for reports, never for choices."""
    model.load_state_dict(weights)
    clients: dict[str, float] = {}
    every: list[float] = []
    for name, part in validation.items():
        assert part.labels is not None
        predicted = predict_masks(model, _images(part)).numpy()
        scores = [
            dice_score(mask, truth, num_classes=num_classes)
            for mask, truth in zip(predicted, part.labels, strict=True)
        ]
        clients[name] = float(np.mean(scores))
        every += scores
    return {"dice": float(np.mean(every)) if every else None, "clients": clients}


def _pack(states: dict[str, AgreementState]) -> State:
    return {name: state.class_confidence for name, state in states.items()}


def run_path(config: Config) -> Path:
    """Folder of the configured run."""
    return config.cache.root / "runs" / config.federate.name
