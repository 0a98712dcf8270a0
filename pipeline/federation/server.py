"""Stage two, ``samfed federate``: rounds of local updates and their fusion. Never loads SAM."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.federation.averaging import Averaging
from pipeline.federation.diagnostics import round_note
from pipeline.federation.exchange import Exchange
from pipeline.federation.inputs import RunInputs, load_inputs
from pipeline.federation.runs import Checkpoint, RunFolder, State
from pipeline.federation.schedule import Progress
from pipeline.runtime import resolve_device, torch_threads

log = logging.getLogger("samfed.federation")


class Rounds(Protocol):
    """What a round is: ``Averaging`` of weights, or an ``Exchange`` of predictions."""

    def start(self, progress: Progress | None) -> Checkpoint:
        """Round 0: the first models, trained on the server's set."""

    def play(self, before: Checkpoint, number: int) -> tuple[Checkpoint, dict[str, Any]]:
        """One round: what it ends with, and its entry of the history."""

    def validate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Mean Dice on the validation parts: for reports, never for choices."""

    def models(self, checkpoint: Checkpoint) -> dict[str, State]:
        """The final models by file name: ``global``, or each client's own."""


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
    kind = Exchange if config.heterogeneous else Averaging
    kind.check(config)  # before anything is read or written
    data = load_inputs(config)
    rounds: Rounds = kind(config, data, device)
    cache, name = config.cache.root, config.federate.name
    run = RunFolder(cache / "runs" / name)
    with writer_lock(cache / "locks" / f"run-{name}.lock"), torch_threads(config.federate.threads):
        notice = run.begin(config, data.fingerprint, mode=mode, archive=cache / "archive" / "runs")
        if notice:
            log.warning(notice)
        _run(config, data, rounds, run, progress)
    return run


def _run(
    config: Config, data: RunInputs, rounds: Rounds, run: RunFolder, progress: Progress | None
) -> None:
    settings = config.federate
    checkpoint = _last(run)
    if checkpoint is None:
        checkpoint = rounds.start(progress)
        run.save_checkpoint(checkpoint, data.fingerprint)
    for number in range(checkpoint.round + 1, settings.rounds + 1):
        began = time.perf_counter()
        checkpoint, entry = rounds.play(checkpoint, number)
        if number == 1:
            entry["warnings"] = [*data.doubts, *entry["warnings"]]
        entry["val"] = rounds.validate(checkpoint)
        entry["seconds"] = round(time.perf_counter() - began, 3)
        run.append_history(entry)
        run.save_checkpoint(checkpoint, data.fingerprint)
        for warning in entry["warnings"]:
            log.warning("round %d: %s", number, warning)
        if progress is not None:
            progress(f"{settings.method}: rounds", number, settings.rounds, round_note(entry))
    run.finish(rounds.models(checkpoint))


def _last(run: RunFolder) -> Checkpoint | None:
    """The checkpoint to go on from; None where there is none, or its history is not whole."""
    checkpoint = run.load_checkpoint()
    rounds = [entry["round"] for entry in run.history()]
    if checkpoint is not None and rounds[: checkpoint.round] != [*range(1, checkpoint.round + 1)]:
        log.warning("%s: history.jsonl lacks rounds; starting again", run.path)
        return None
    return checkpoint
