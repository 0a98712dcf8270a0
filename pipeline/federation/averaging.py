"""Rounds of clients with one network: local updates from the broadcast weights, then an average.

An update is checked when it arrives: names, shapes, dtypes, finite values, and how far it goes.
Whether it goes too far for this round is known only when all have arrived, so updates wait in files
meanwhile; memory does not grow with the clients.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from statistics import median

import numpy as np
import torch

from pipeline import methods
from pipeline.config import Config
from pipeline.disk import naming
from pipeline.federation.aggregation import Aggregation, check_update, update_norm
from pipeline.federation.agreement import Calibration
from pipeline.federation.diagnostics import FEWEST_TO_COMPARE
from pipeline.federation.local_update import train_on_server
from pipeline.federation.messages import FitRequest, Reply
from pipeline.federation.panels import public_examples
from pipeline.federation.rounds import Round, Strategy
from pipeline.federation.runs import RunFolder
from pipeline.federation.schedule import server_seed
from pipeline.federation.targets import measure_calibration
from pipeline.federation.workplace import Workplace
from pipeline.segmentation.networks import State

#: No training moves weights by more than so many times their own norm in a round.
MAX_CHANGE = 100.0
#: How far beyond the median of the round an update may go. It is a matter of trained parameters:
#: batch norm's running statistics go some 20 times as far, and by how far depends on the images.
MAX_MEDIANS = 20.0


class Averaging(Strategy):
    """FedAvg or the coordinate median of all that took part in a round."""

    def __init__(self, config: Config, workplace: Workplace, updates: Path) -> None:
        """Keep a round's updates in the folder ``updates`` until they are averaged."""
        self._config, self._workplace, self._updates = config, workplace, updates
        self._calibration = Calibration()
        self._norm = 0.0  # of the broadcast weights
        self._trained: State = {}  # the broadcast weights without batch norm's statistics
        self._arrived: dict[str, tuple[int, float]] = {}  # images and norm, by client

    def begin(self, this: Round) -> None:
        """Measure the calibration, as each client would: all hold D_p and the same weights."""
        sent = this.before.weights
        self._calibration, self._arrived = self._measure(sent), {}
        self._norm = update_norm(sent, {name: value * 0 for name, value in sent.items()})
        network = self._workplace.frozen(self._config.model, sent)
        self._trained = {name: sent[name] for name, _ in network.named_parameters()}
        shutil.rmtree(self._updates, ignore_errors=True)  # of a killed run
        self._updates.mkdir(parents=True)

    def fit_request(self, this: Round, client: str) -> FitRequest:
        """Return a request to train from the broadcast weights."""
        return FitRequest(
            **this.address(client),
            rates=this.rates,
            weights=this.before.weights,
            calibration=self._calibration,
        )

    def accept(self, this: Round, reply: Reply) -> str | None:
        """Check an update against the broadcast weights, and put it into its file."""
        update, sent = reply.weights or {}, this.before.weights
        reason = check_update(update, sent)
        images = {entry.name: entry.images for entry in this.engine.entries}[reply.client]
        if reason is not None or reply.images != images:
            return reason or f"it counts {reply.images} images, expected {images}"
        change = update_norm(update, sent)
        if change > MAX_CHANGE * self._norm:
            times = change / self._norm
            return f"it changes the model by {times:.0%}, more than {MAX_CHANGE:.0%}"
        self._arrived[reply.client] = images, update_norm(update, self._trained)
        path = self._path(reply.client)
        with naming(path):  # not durable: a round that stops is repeated
            path.write_bytes(b"".join(update[name].numpy().tobytes() for name in sent))
        return None

    def finish(self, this: Round) -> State:
        """Average, in the clients' order, the updates that do not go far beyond the median's."""
        settings = self._config.federate
        norms = [norm for _, norm in self._arrived.values()]
        usual = median(norms) if len(norms) >= FEWEST_TO_COMPARE else math.inf
        combined = Aggregation(this.before.weights, settings.aggregation)
        for client, (images, norm) in self._arrived.items():
            if norm > MAX_MEDIANS * usual:
                reason = f"its norm is {norm / usual:.0f} times the median of the round's"
                this.reject_update(client, f"{reason}, more than {MAX_MEDIANS:.0f}")
            else:
                combined.add(_read(self._path(client), this.before.weights), images)
        shutil.rmtree(self._updates)
        weights = combined.result()
        if not methods.METHODS[settings.method].tunes_at_server:
            return weights
        model = self._workplace.loaded(self._config.model, weights)
        rates = [this.rates.learning_rate] * settings.local_steps
        seed, public = server_seed(self._config.seed, this.number), self._workplace.public
        return train_on_server(model, public, rates, seed=seed, settings=settings)

    def shared(self, weights: State) -> State:
        """Return the global model's weights, which all clients are scored with."""
        return weights

    def conclude(self, run: RunFolder, weights: State) -> Calibration:
        """Keep the global model, and D_p's example images."""
        run.save_model(weights)
        calibration, public = self._measure(weights), self._workplace.public
        model = self._workplace.frozen(self._config.model, weights)
        examples = public_examples(model, public, calibration, config=self._config)
        run.save_examples(examples)
        return calibration

    def _measure(self, weights: State) -> Calibration:
        model = self._workplace.frozen(self._config.model, weights)
        return measure_calibration(model, self._workplace.public, self._config)

    def _path(self, client: str) -> Path:
        return self._updates / f"{client}.safetensors"


def _read(path: Path, like: State) -> State:
    """Read an update, whose names, shapes and dtypes are those of ``like``."""
    content, start, update = path.read_bytes(), 0, {}
    for name, old in like.items():
        values = np.frombuffer(content, old.numpy().dtype, old.numel(), start)
        update[name] = torch.from_numpy(values.reshape(old.shape).copy())
        start += old.nbytes
    return update
