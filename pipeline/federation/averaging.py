"""Rounds of clients with one network: local updates from the broadcast weights, then an average."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from pipeline.config import Config
from pipeline.errors import SamfedError
from pipeline.federation.aggregation import Aggregation, check_update
from pipeline.federation.agreement import AgreementState
from pipeline.federation.diagnostics import (
    client_warnings,
    finite,
    mean_dice,
    report,
    round_warnings,
)
from pipeline.federation.engines import run_in_process
from pipeline.federation.inputs import RunInputs
from pipeline.federation.local_update import (
    LocalResult,
    broadcast_model,
    local_update,
    measure_calibration,
    train_on_server,
)
from pipeline.federation.pretraining import first_model
from pipeline.federation.runs import Checkpoint
from pipeline.federation.schedule import (
    Progress,
    client_seed,
    learning_rate,
    participants,
    server_seed,
    unlabelled_weight,
)
from pipeline.segmentation.networks import State, build_model


class Averaging:
    """Homogeneous clients: FedAvg or the coordinate median of all that took part in a round."""

    def __init__(self, config: Config, data: RunInputs, device: torch.device) -> None:
        self._config = config
        self._data = data
        self._model = build_model(config, seed=config.seed).to(device)

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where the network cannot be built."""
        build_model(config, seed=config.seed)

    def start(self, progress: Progress | None) -> Checkpoint:
        """The first global model; made once for all runs whose settings that decide it agree."""
        config = self._config
        weights = first_model(
            config, config.model, self._model, self._data.server, progress=progress
        )
        initial = AgreementState.initial(config.data.num_classes).as_tensor()
        states = {client.name: initial for client in self._data.clients}
        return Checkpoint(0, weights, states, self._data.partition)

    def play(self, before: Checkpoint, number: int) -> tuple[Checkpoint, dict[str, Any]]:
        """Every participant's local update, then the average in client order."""
        config, data = self._config, self._data
        rate, weight = learning_rate(config, number), unlabelled_weight(config, number)
        self._model.load_state_dict(before.weights)
        # all clients hold D_p and the same weights, so they would measure the same
        calibration = measure_calibration(self._model, data.server, config)
        broadcast = broadcast_model(self._model, config.federate)

        def update(index: int) -> tuple[LocalResult, float]:
            client = data.clients[index]
            began = time.perf_counter()
            state = AgreementState.from_tensor(before.client_states[client.name])
            result = local_update(
                self._model,
                before.weights,
                client,
                data.server,
                replace(state, calibration=calibration),
                config=config.federate,
                agreement=config.agreement,
                learning_rate=rate,
                unlabelled_weight=weight,
                seed=client_seed(config.seed, number, index),
                broadcast=broadcast,
            )
            return result, time.perf_counter() - began

        chosen = participants(config, len(data.clients), number)
        results = zip(chosen, run_in_process(update, chosen), strict=True)
        after, clients, warnings = self._aggregate(before, number, results)
        if config.federate.method == "semifl":
            after = replace(after, weights=self._fine_tune(after.weights, number, rate))
        entry = {
            "round": number,
            "unlabelled_weight": weight,
            "learning_rate": rate,
            "clients": clients,
            "warnings": warnings,
        }
        return after, entry

    def validate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Mean Dice of the averaged model on the validation parts."""
        self._model.load_state_dict(checkpoint.weights)
        parts = self._data.validation.items()
        return mean_dice(((name, self._model, part) for name, part in parts), self._config)

    def models(self, checkpoint: Checkpoint) -> dict[str, State]:
        """The global model."""
        return {"global": checkpoint.weights}

    def _aggregate(
        self,
        before: Checkpoint,
        number: int,
        results: Iterable[tuple[int, tuple[LocalResult, float]]],
    ) -> tuple[Checkpoint, dict[str, Any], list[str]]:
        """Combine the usable updates; also what the clients report, and warnings."""
        config = self._config
        combined = Aggregation(before.weights, config.federate.aggregation)
        states = dict(before.client_states)
        clients: dict[str, Any] = {}
        warnings: list[str] = []
        usable = 0
        for index, (result, seconds) in results:
            name = self._data.clients[index].name
            sent = sum(value.nbytes for value in result.weights.values())
            clients[name] = report(result, seconds=seconds, bytes_up=sent, bytes_down=sent)
            broken = check_update(result.weights, before.weights)
            if broken is not None:
                warnings.append(f"{name}: update rejected, {broken}")
                continue
            combined.add(result.weights, result.images)
            usable += 1
            states[name] = result.state.as_tensor()
            warnings += client_warnings(config, name, clients[name])
        if not usable:
            raise SamfedError(
                f"round {number}: no client sent a usable update ({warnings[0]}); "
                "lower federate.learning_rate"
            )
        warnings += round_warnings(config, clients)
        after = Checkpoint(number, combined.result(), states, before.partition)
        return after, {name: finite(each) for name, each in clients.items()}, warnings

    def _fine_tune(self, weights: State, number: int, rate: float) -> State:
        """SemiFL's server step: the averaged model goes on with D_p alone."""
        settings = self._config.federate
        self._model.load_state_dict(weights)
        return train_on_server(
            self._model,
            self._data.server,
            config=settings,
            steps=settings.local_steps,
            rate=lambda _: rate,
            seed=server_seed(self._config.seed, number),
        )
