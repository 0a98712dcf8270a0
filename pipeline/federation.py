"""Stage two, ``samfed federate``: rounds of local updates and averaging. Never loads SAM."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn

from pipeline.aggregation import FedAvg, first_not_finite
from pipeline.agreement import AgreementState
from pipeline.cohort import Cohort, as_tensor, load_cohort, start_key
from pipeline.config import AGREEMENT_METHODS, Config
from pipeline.devices import resolve_device, torch_threads
from pipeline.engines import run_in_process
from pipeline.errors import SamfedError
from pipeline.locks import writer_lock
from pipeline.metrics import dice_score
from pipeline.models import State, build_model, predict_masks
from pipeline.runs import Checkpoint, RunFolder, load_state, save_state
from pipeline.stores.images import ImageSet
from pipeline.training import (
    ClientData,
    LocalResult,
    cosine,
    local_update,
    train_on_server,
)

log = logging.getLogger("samfed.federation")

Progress = Callable[[str, int, int], None]


def federate(config: Config, *, mode: str = "auto", progress: Progress | None = None) -> RunFolder:
    """Run all rounds of ``config.federate.method`` and write ``cache/runs/<name>/``.

    A run with the same parameters and data continues after its last finished round, and ends with
    the same bytes as if it had never stopped.

    Args:
        mode: ``auto`` (continue or begin), ``resume`` (only continue) or ``restart``.

    Raises:
        StageError: an earlier stage is missing. LockedStoreError: the run is being made already.
        SamfedError: no client sent a usable update.
    """
    device = resolve_device(config.federate.device)
    model = build_model(config, seed=config.seed).to(device)  # before anything is written
    data = load_cohort(config)
    cache, name = config.cache.root, config.federate.name
    run = RunFolder(cache / "runs" / name)
    with writer_lock(cache / "locks" / f"run-{name}.lock"), torch_threads(config.federate.threads):
        notice = run.begin(config, data.fingerprint, mode=mode, aside=cache / "aside" / "runs")
        if notice:
            log.warning(notice)
        _run(config, data, model, run, progress)
    return run


# --------------------------------------------------------------------------- rounds


def _run(
    config: Config, data: Cohort, model: nn.Module, run: RunFolder, progress: Progress | None
) -> None:
    settings = config.federate
    checkpoint = run.load_checkpoint()
    rounds = [entry["round"] for entry in run.history()]
    if checkpoint is not None and rounds[: checkpoint.round] != [*range(1, checkpoint.round + 1)]:
        log.warning("%s: history.jsonl lacks rounds; starting again", run.path)
        checkpoint = None
    if checkpoint is None:
        weights = _server_start(config, data, model, progress)
        states = {c.name: AgreementState.initial(config.data.num_classes) for c in data.clients}
        checkpoint = Checkpoint(0, weights, _pack(states), data.partition)
        run.save_checkpoint(checkpoint, data.fingerprint)
    for number in range(checkpoint.round + 1, settings.rounds + 1):
        began = time.perf_counter()
        weights, states, entry = _round(config, data, model, checkpoint, number)
        entry["val"] = _validate(model, weights, data.validation, config.data.num_classes)
        entry["seconds"] = round(time.perf_counter() - began, 3)
        checkpoint = Checkpoint(number, weights, _pack(states), data.partition)
        run.append_history(entry)
        run.save_checkpoint(checkpoint, data.fingerprint)
        for warning in entry["warnings"]:
            log.warning("round %d: %s", number, warning)
        if progress is not None:
            progress(f"{settings.method}: rounds", number, settings.rounds)
    run.finish(checkpoint.weights)


def _server_start(
    config: Config, data: Cohort, model: nn.Module, progress: Progress | None
) -> State:
    """The first global model; made once for all runs whose settings that decide it are equal."""
    steps = config.federate.start_steps
    kept = config.cache.root / "starts" / f"{start_key(config)}.safetensors"
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


def _round(
    config: Config, data: Cohort, model: nn.Module, before: Checkpoint, number: int
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

    results = zip(data.clients, run_in_process(update, range(len(data.clients))), strict=True)
    weights, states, clients, warnings = _aggregate(config, before, results, number)
    entry = {
        "round": number,
        "unlabelled_weight": unlabelled_weight,
        "learning_rate": rate,
        "clients": clients,
        "warnings": warnings,
    }
    return weights, states, entry


def _aggregate(
    config: Config,
    before: Checkpoint,
    results: Iterable[tuple[ClientData, LocalResult]],
    number: int,
) -> tuple[State, dict[str, AgreementState], dict[str, Any], list[str]]:
    """Average the usable updates in client order; also new states, diagnostics and warnings."""
    mean, usable = FedAvg(), 0
    states = {name: AgreementState(state) for name, state in before.client_states.items()}
    clients: dict[str, Any] = {}
    warnings: list[str] = []
    for client, result in results:
        clients[client.name] = {"images": result.images, **_finite(result.diagnostics)}
        broken = first_not_finite(result.weights)
        if broken is not None:
            warnings.append(f"{client.name}: update rejected, '{broken}' is not finite")
            continue
        mean.add(result.weights, result.images)
        usable += 1
        states[client.name] = result.state
        warnings += _floors(config, client.name, result)
    if not usable:
        raise SamfedError(
            f"round {number}: no client sent a usable update ({warnings[0]}); "
            "lower federate.learning_rate"
        )
    return mean.result(), states, clients, warnings


def _finite(diagnostics: dict[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN: what is not finite becomes null."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in diagnostics.items()}


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
        predicted = predict_masks(model, as_tensor(part)).numpy()
        scores = [
            dice_score(mask, truth, num_classes=num_classes)
            for mask, truth in zip(predicted, part.labels, strict=True)
        ]
        clients[name] = float(np.mean(scores))
        every += scores
    return {"dice": float(np.mean(every)) if every else None, "clients": clients}


def _pack(states: dict[str, AgreementState]) -> State:
    return {name: state.class_confidence for name, state in states.items()}
