"""Rounds of clients with one network: local updates from the broadcast weights, then an average.

An update is checked when it arrives: names, shapes, dtypes, finite values, and how far it goes.
Whether it goes too far for this round is known only when all have arrived, so updates wait in files
meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pipeline import methods
from pipeline.config import AggregationName, Config
from pipeline.federation.aggregation import aggregate, check_update, fewest_updates, update_norms
from pipeline.federation.agreement import Calibration
from pipeline.federation.compression import WEIGHT_STEPS, Packed, pack, unpack_update
from pipeline.federation.diagnostics import FEWEST_TO_COMPARE
from pipeline.federation.examples import public_examples
from pipeline.federation.local_update import train_on_server
from pipeline.federation.messages import FitRequest, Reply
from pipeline.federation.privacy import Noise, noise_key, private_mean
from pipeline.federation.rounds import Round, Strategy
from pipeline.federation.runs import RunFolder
from pipeline.federation.server_optimizer import server_step
from pipeline.federation.targets import measure_calibration
from pipeline.federation.updates import Updates
from pipeline.federation.workplace import Workplace
from pipeline.segmentation.networks import State

#: No training moves weights by more than so many times their own norm in a round.
MAX_CHANGE = 100.0
#: How far beyond the median of the round an update may go. It is a matter of trained parameters:
#: batch norm's running statistics go some 20 times as far, and by how far depends on the images.
MAX_MEDIANS = 20.0


class Averaging(Strategy):
    """The weighted mean of all that took part in a round, or a rule that resists hostile ones."""

    def __init__(self, config: Config, workplace: Workplace, folder: Path) -> None:
        """Keep a round's updates in ``folder`` until they are averaged."""
        self._config, self._workplace, self._folder = config, workplace, folder
        self._calibration = Calibration()
        self._sent: State | Packed = {}  # the broadcast weights as they travel
        self._norm = 0.0  # of the broadcast weights
        self._trained: State = {}  # the broadcast weights without batch norm's statistics
        self._norms: dict[str, float] = {}  # of what each client did to these
        self._images: dict[str, int] = {}  # of each client
        self._updates: Updates

    def begin(self, this: Round) -> None:
        """Measure the calibration, as each client would: all hold D_p and the same weights."""
        sent = this.before.weights
        self._sent, self._norms = self.broadcast(sent), {}
        self._images = {entry.name: entry.images for entry in this.engine.entries}
        received = self._workplace.unpacked(self._config.model, self._sent)
        self._calibration = self._measure(received)
        self._norm, _ = update_norms(sent, {name: each * 0 for name, each in sent.items()}, ())
        network = self._workplace.frozen(self._config.model, received)
        self._trained = {name: sent[name] for name, _ in network.named_parameters()}
        self._updates = Updates(self._folder, sent)

    def fit_request(self, this: Round, client: str) -> FitRequest:
        """Return a request to train from the broadcast weights."""
        return FitRequest(
            **this.address(client),
            rates=this.rates,
            weights=self._sent,
            calibration=self._calibration,
        )

    def accept(self, this: Round, reply: Reply) -> str | None:
        """Check an update against the broadcast weights, and put it into its file."""
        sent, update = this.before.weights, reply.weights or {}
        if isinstance(update, Packed):
            try:
                update = unpack_update(update, sent)
            except ValueError as error:
                return str(error)
        reason = check_update(update, sent)
        images = self._images[reply.client]
        if reason is not None or reply.images != images:
            return reason or f"it counts {reply.images} images, expected {images}"
        change, trained = update_norms(update, sent, self._trained)
        if change > MAX_CHANGE * self._norm > 0:
            times = change / self._norm
            return f"it changes the model by {times:.0%}, more than {MAX_CHANGE:.0%}"
        self._norms[reply.client] = trained
        # a number of images would be a client's own claim of how much it counts
        self._updates.add(reply.client, update, 1 if self._config.privacy.on else images)
        return None

    def review(self, this: Round) -> None:
        """Reject what goes far beyond the median's norm; ask for as many as the rule needs."""
        # under privacy one client must not decide what others count; clipping bounds them all
        compares = len(self._norms) >= FEWEST_TO_COMPARE and not self._config.privacy.on
        # where most send back what they received there is nothing to compare with
        usual = (median(self._norms.values()) if compares else 0.0) or math.inf
        for client, norm in self._norms.items():
            if norm > MAX_MEDIANS * usual:
                reason = f"its norm is {norm / usual:.0f} times the median of the round's"
                this.reject_update(client, f"{reason}, more than {MAX_MEDIANS:.0f}")
                self._updates.drop(client)
        this.require(len(self._updates), "a usable update", fewest_updates(self._rule, 0))

    def finish(self, this: Round) -> State:
        """Combine the updates that are left, and take the server's step."""
        settings = self._config.federate
        weights, chosen = self._combined(len(this.clients))
        for client in self._updates.weights if len(chosen) < len(self._updates) else ():
            this.reports[client]["chosen"] = client in chosen
        self._updates.close()
        before = this.before
        weights, this.moments = server_step(
            before.weights, weights, before.moments, trained=self._trained, settings=settings
        )
        if not methods.METHODS[settings.method].tunes_at_server:
            return weights
        model = self._workplace.loaded(self._config.model, weights)
        rates = [this.rates.learning_rate] * settings.local_steps
        streams, public = this.streams(self._config.seed), self._workplace.public
        return train_on_server(model, public, rates, streams=streams, config=self._config)

    def shared(self, weights: State) -> State:
        """Return the global model's weights, which answer for all clients."""
        return weights

    def broadcast(self, weights: State) -> State | Packed:
        """Return the global model's weights, packed where the settings ask for it."""
        kind = self._config.federate.compression
        return weights if kind == "none" else pack(weights, kind, steps=WEIGHT_STEPS)

    def conclude(self, run: RunFolder, weights: State) -> Calibration:
        """Keep D_p's example images."""
        calibration, public = self._measure(weights), self._workplace.public
        model = self._workplace.frozen(self._config.model, weights)
        examples = public_examples(model, public, calibration, config=self._config)
        run.save_examples(examples)
        return calibration

    def _combined(self, asked: int) -> tuple[State, Sequence[str]]:
        """Return the combined updates, and whose they are."""
        updates, privacy = self._updates, self._config.privacy
        if privacy.mode != "server":
            hostile = self._config.federate.byzantine
            return aggregate(updates, self._rule, byzantine=hostile, trained=self._trained)
        noise = Noise(noise_key(self._config.cache.root), "the sum")
        trained = self._trained
        weights = private_mean(updates, asked=asked, trained=trained, settings=privacy, noise=noise)
        return weights, list(updates.weights)

    @property
    def _rule(self) -> AggregationName:
        return self._config.federate.aggregation

    def _measure(self, weights: State) -> Calibration:
        model = self._workplace.frozen(self._config.model, weights)
        return measure_calibration(model, self._workplace.public, self._config)
