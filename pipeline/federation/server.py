"""Stage two, ``samfed federate``: rounds of local updates and their fusion. Never loads SAM."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.doubts import contradictions, untold
from pipeline.errors import DataError
from pipeline.federation.averaging import Averaging
from pipeline.federation.description import (
    FEWEST_IMAGES,
    describe,
    public_moments,
    training_of,
)
from pipeline.federation.diagnostics import client_doubts, drifts, link_warnings, round_note
from pipeline.federation.engines import Connect, in_process
from pipeline.federation.exchange import Exchange
from pipeline.federation.inputs import RunInputs, load_inputs
from pipeline.federation.messages import DescribeRequest, EvaluateRequest, Reply
from pipeline.federation.pretraining import first_model
from pipeline.federation.privacy import check_privacy, guarantee
from pipeline.federation.rounds import Engine, Round, Strategy, TooFewError, asked
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.federation.schedule import Rates, check_participants, participants
from pipeline.federation.tracking import Track
from pipeline.federation.weight_average import WeightAverage
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.progress import Progress
from pipeline.runtime import resolve_device, torch_threads
from pipeline.segmentation.likeness import (
    Moments,
    pooled_features,
    statistics,
    threshold_of,
    usual_distance,
)

TRAINING = "clients' training in this round"
EXAMPLES = "clients' examples with the final model"
LIKENESS = "clients' images under the final model"

log = logging.getLogger("samfed.federation")


def federate(
    config: Config,
    *,
    mode: str = "auto",
    progress: Progress | None = None,
    connect: Connect = in_process,
    track: Track | None = None,
) -> RunFolder:
    """Run all rounds of ``config.federate.method`` and write ``cache/runs/<name>/``.

    A run with the same parameters and data continues after its last finished round, and ends with
    the same bytes as if it had never stopped.

    Args:
        mode: ``auto`` (continue or begin), ``resume`` (only continue) or ``restart``.
        connect: how the run's clients are reached.
        track: is told each round of the run, also those of an earlier start.

    Raises:
        StageError: an earlier stage is missing. LockedStoreError: the run is being made already.
        ConfigError: there are too few clients for the settings.
        TooFewError: fewer than ``federate.min_clients`` sent a usable update, twice.
    """
    # before anything is read or written
    networks = build_networks(config, resolve_device(config.federate.device))
    inputs = load_inputs(config)
    check_participants(config, len(inputs.contexts))
    check_privacy(config)
    workplace = Workplace(config, inputs.public, networks)
    cache, name = config.cache.root, config.federate.name
    run = RunFolder(cache / "runs" / name)
    strategy: Strategy = (
        Exchange(config, workplace, len(inputs.contexts))
        if config.heterogeneous
        else Averaging(config, workplace, run.path / "updates")
    )
    with (
        writer_lock(cache / "locks" / f"run-{name}.lock"),
        torch_threads(config.federate.threads),
        connect(inputs.contexts, workplace) as engine,
    ):
        notice = run.begin(config, inputs.fingerprint, mode=mode, archive=cache / "archive/runs")
        if notice:
            log.warning(notice)
        Server(config, inputs, workplace, strategy, engine, run, progress).run_all(track)
    return run


@dataclass(frozen=True)
class Server:
    """The rounds of one run. It knows its clients by their entries and by messages alone."""

    config: Config
    inputs: RunInputs
    workplace: Workplace
    strategy: Strategy
    engine: Engine
    run: RunFolder
    progress: Progress | None = None

    def run_all(self, track: Track | None = None) -> None:
        """Run the rounds that are left, and keep what the run leaves behind."""
        settings, checkpoint = self.config.federate, self._last()
        if checkpoint is None:
            checkpoint = self._first()
            self.run.save_checkpoint(checkpoint)
        rounds = f"{settings.method}: rounds"
        self._show(rounds, checkpoint.round, settings.played_rounds)
        if track is not None:
            for entry in self.run.history()[: checkpoint.round]:
                track(entry)
        for number in range(checkpoint.round + 1, settings.played_rounds + 1):
            began = time.perf_counter()
            checkpoint, entry = self._play(checkpoint)
            entry["val"] = self._validate(self._final(checkpoint))
            entry |= {"privacy": self._guarantee(number)} if self.config.privacy.on else {}
            entry["seconds"] = round(time.perf_counter() - began, 3)
            self.run.append_history(entry)
            self.run.save_checkpoint(checkpoint)
            for warning in entry["warnings"]:
                log.warning("round %d: %s", number, warning)
            self._show(rounds, number, settings.played_rounds, round_note(entry))
            if track is not None:
                track(entry)
        self._conclude(self._final(checkpoint))

    def _guarantee(self, rounds: int) -> dict[str, float]:
        return guarantee(self.config, [entry.name for entry in self.engine.entries], rounds)

    def _show(self, what: str, done: int, total: int, note: str = "") -> None:
        if self.progress is not None:
            self.progress(what, done, total, note)

    def _last(self) -> Checkpoint | None:
        """Return the checkpoint to go on from, or None if there is none.

        Raises:
            DataError: its history is damaged or lacks rounds. A round's entry is written before its
            checkpoint, so that no kill can have caused it.
        """
        checkpoint, rounds = self.run.load_checkpoint(), len(self.run.history())
        if checkpoint is not None and rounds < checkpoint.round:
            raise DataError(
                f"{self.run.path / 'history.jsonl'}: found {rounds} rounds, expected at least "
                f"{checkpoint.round}, as many as the last checkpoint has; run `samfed federate "
                "--restart`, which keeps this run in the archive"
            )
        return checkpoint

    def _first(self) -> Checkpoint:
        """Train every kind of network on D_p; return round 0 with the server's."""
        for network in (*self.config.model.clients, self.config.model):
            weights = first_model(
                self.config,
                network,
                self.inputs.public,
                public_sha256=self.inputs.public_sha256,
                progress=self.progress,
            )
        return Checkpoint(0, weights, {}, self.inputs.partition, self.inputs.fingerprint)

    def _play(self, before: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """Play the next round, a second time where too few clients sent what counts."""
        try:
            return self._attempt(before)
        except TooFewError as error:
            log.warning("%s; the round is repeated", error)
            return self._attempt(before)

    def _attempt(self, before: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """Play a round; return what it ends with, and its entry of the history."""
        config, entries, number = self.config, self.engine.entries, before.round + 1
        chosen = participants(config, [entry.name for entry in entries], number)
        rates, fewest = Rates.of(config, number), config.federate.min_clients
        this = Round(before, chosen, rates, self.engine, fewest)
        self.strategy.begin(this)
        self._show(TRAINING, 0, len(chosen))
        requests = [self.strategy.fit_request(this, client) for client in this.left]
        for done, reply in enumerate(this.ask(requests), start=1):
            self._show(TRAINING, done, len(chosen))
            reason = reply.fault or self.strategy.accept(this, reply)
            if reason:
                this.reject_update(reply.client, reason)
        self.strategy.review(this)
        weights = self.strategy.finish(this)
        trained = {client: this.reports[client] for client in this.left}
        doubts = [*drifts(config, this.reports), *client_doubts(config, trained)]
        doubts += contradictions({entry.name: entry.flip_dice for entry in entries}, config)
        past = self.run.history()[: before.round]
        this.warnings += untold(doubts, [line for entry in past for line in entry["warnings"]])
        if number == 1:
            this.warnings += link_warnings(config, this.reports)
        rounds = before.client_rounds | dict.fromkeys(this.left, number)
        after = replace(before, round=number, weights=weights, moments=this.moments)
        return replace(after, client_rounds=rounds, average=self._average(after)), this.entry()

    def _average(self, after: Checkpoint) -> WeightAverage:
        """Return the mean of the last rounds' shared weights with those of a round."""
        average, shared = after.average, self.strategy.shared(after.weights)
        if shared is None:
            return average
        return average.after(after.round, shared, settings=self.config.federate)

    def _final(self, after: Checkpoint) -> Checkpoint:
        """Return a checkpoint with the weights that the run ends with, once the rounds are over."""
        if after.round < self.config.federate.played_rounds:
            return after
        return replace(after, weights=after.average.mean(after.weights))

    def _evaluate(self, after: Checkpoint, names: Sequence[str], **ask: Any) -> Iterator[Reply]:
        """Ask clients to score the models as they are after a round."""
        requests = [EvaluateRequest(**after.address(name, after.round), **ask) for name in names]
        for _, reply in asked(self.engine, requests):
            yield reply

    def _validate(self, after: Checkpoint) -> dict[str, Any]:
        """Return the mean Dice over all validation images, and each client's."""
        asks = not self.config.privacy.on  # else nobody tells any score
        asked_for = {e.name: e.val_images for e in self.engine.entries if e.val_images and asks}
        scores: dict[str, float] = {}
        images = total = 0.0
        weights = self.strategy.broadcast(after.weights)
        for reply in self._evaluate(after, [*asked_for], part="val", weights=weights):
            dice, fault = reply.metrics.get("dice"), reply.fault
            if not fault and (dice is None or not 0 <= dice <= 1):
                fault = f"its Dice is {dice}"
            if not fault and reply.images != asked_for[reply.client]:
                fault = f"it counts {reply.images} images, expected {asked_for[reply.client]}"
            if fault or dice is None:
                log.warning("%s: validation score rejected, %s", reply.client, fault)
                continue
            scores[reply.client] = dice
            images, total = images + reply.images, total + dice * reply.images
        return {"dice": total / images if images else None, "clients": scores}

    def _conclude(self, after: Checkpoint) -> None:
        """Keep models and examples, each where it belongs; doing it again changes nothing."""
        calibration = self.strategy.conclude(self.run, after.weights)
        names = [entry.name for entry in self.engine.entries]
        ask = {"weights": self.strategy.shared(after.weights), "calibration": calibration}
        # each client keeps its own
        self._show(EXAMPLES, 0, len(names))
        replies = self._evaluate(after, names, part=None, final=True, **ask)
        for done, reply in enumerate(replies, start=1):
            self._show(EXAMPLES, done, len(names))
            if reply.fault:
                log.warning("%s: kept nothing, %s; run again", reply.client, reply.fault)
        if self.strategy.shared(after.weights) is not None:
            self._keep_model(after)

    def _keep_model(self, after: Checkpoint) -> None:
        """Keep the global model and its spec, which takes two questions to the clients."""
        entries, config = self.engine.entries, self.config
        model = self.workplace.frozen(config.model, after.weights)
        public = self.inputs.public
        found = [public_moments(model, public)]
        sums = {entry.name: entry.images for entry in entries if entry.images >= FEWEST_IMAGES}
        for reply in self._ask_about(after, sums):
            part = Moments.received(sums[reply.client], reply.features, like=found[0])
            if part is None:
                log.warning("%s: what it says of its images is left out", reply.client)
            else:
                found.append(part)
        given = statistics(found)
        distances = [usual_distance(pooled_features(model, public.calibration.images), given)]
        for reply in self._ask_about(after, [e.name for e in entries], given.as_tensor()):
            distance = reply.metrics.get("distance")
            if distance is None or not math.isfinite(distance):
                log.warning("%s: its images' distance is left out", reply.client)
            else:
                distances.append(distance)
        images = sum(entry.images for entry in entries)
        training = training_of(config, public, images=images, clients=len(entries))
        spec = describe(
            model,
            public,
            given.with_threshold(threshold_of(distances)),
            config=config,
            network=config.model,
            training=training.model_copy(update=self._guarantee(after.round)),
        )
        self.run.save_model(after.weights, spec)

    def _ask_about(
        self, after: Checkpoint, names: Iterable[str], statistics: Tensor | None = None
    ) -> Iterator[Reply]:
        """Ask clients how their images look to the final model; under privacy they do not tell."""
        requests = [
            DescribeRequest(
                **after.address(name, after.round), weights=after.weights, statistics=statistics
            )
            for name in names
            if not self.config.privacy.on
        ]
        if requests:
            self._show(LIKENESS, 0, len(requests))
        for done, (_, reply) in enumerate(asked(self.engine, requests), start=1):
            self._show(LIKENESS, done, len(requests))
            yield reply
