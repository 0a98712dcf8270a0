"""Rounds of clients with networks of their own: predictions on D_p cross the border, not weights.

Order of a round (HSSF, Ma et al., IEEE TMI 2024): every client predicts a noised copy of D_p; the
server condenses the logits into its own model and sends that model's logits; every client distils
them into its own network, then trains on its own images. ``fedmd`` sends the mean of the clients'
logits instead. Methods without an exchange only train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pipeline import methods
from pipeline.config import Config
from pipeline.errors import ConfigError, SamfedError
from pipeline.federation.codistillation import (
    BestClient,
    Consensus,
    MeanLogits,
    Teacher,
    distil,
    grades,
    public_logits,
)
from pipeline.federation.messages import DistilRequest, FitRequest, PredictRequest, Reply
from pipeline.federation.rounds import Round, Strategy
from pipeline.federation.runs import RunFolder
from pipeline.federation.schedule import Rates
from pipeline.federation.workplace import Workplace
from pipeline.segmentation.networks import State, get_state


@dataclass(frozen=True)
class ExchangeRule:
    """How logits on D_p become the server's answer, and what that teaches a client."""

    combine: type[MeanLogits] | type[BestClient]
    condenses: bool  # whether the server's model learns from the combined logits, and answers
    teacher: Callable[[Tensor, Tensor, Rates], Teacher | Consensus]  # of answer and labels


#: By ``MethodTraits.exchange``; "none" has no exchange.
EXCHANGES: Mapping[methods.Exchange, ExchangeRule] = MappingProxyType(
    {
        "mean": ExchangeRule(MeanLogits, False, lambda logits, labels, rates: Consensus(logits)),
        "condensation": ExchangeRule(
            BestClient,
            True,
            lambda logits, labels, rates: Teacher(
                logits, labels, grades(logits, labels), kl_weight=rates.kl_weight
            ),
        ),
    }
)


class Exchange(Strategy):
    """RC and RF, FedMD, or no exchange at all, by the method."""

    def __init__(self, config: Config, workplace: Workplace, clients: int) -> None:
        """Raise ConfigError where the networks do not fit the clients, or D_p no batch."""
        self._config, self._workplace = config, workplace
        self._rule = EXCHANGES.get(methods.METHODS[config.federate.method].exchange)
        self._weights: State = {}
        self._heard: set[str] = set()
        networks, public = len(config.model.clients), len(workplace.public.images)
        if networks > clients:
            raise ConfigError(
                f"model.clients: found {networks} networks for {clients} clients; list at most one "
                "for each"
            )
        if self._rule is not None and public < 2:
            raise ConfigError(
                f"D_p's training part has {public} image, expected at least 2 to train on "
                f"predictions ({config.federate.method}); raise partition.server_images"
            )

    def begin(self, this: Round) -> None:
        """Combine the clients' predictions, and let those distil the answer who sent usable ones.

        One client's logits are in memory at a time.
        """
        self._weights, self._heard = this.before.weights, set()
        if self._rule is None:
            return
        labels, classes = self._workplace.public.labels, self._config.data.num_classes
        combined = self._rule.combine(labels, num_classes=classes)
        for reply in this.ask([PredictRequest(**this.address(name)) for name in this.clients]):
            try:
                combined.add(_logits(reply))
                self._heard.add(reply.client)
            except ValueError as error:
                this.refuse(f"{reply.client}: predictions rejected, {error}")
        this.require(len(self._heard), "usable predictions")
        answer: Any = combined.result()
        logits = self._condense(this, answer) if self._rule.condenses else answer
        requests = [
            DistilRequest(**this.address(name), logits=logits, rates=this.rates)
            for name in this.clients
            if name in self._heard
        ]
        for reply in this.ask(requests):  # the networks stay with the clients
            if reply.fault:
                this.reject_update(reply.client, reply.fault)

    def _condense(self, this: Round, best: Teacher) -> Tensor:
        """Let the server's model learn by RC; return its logits."""
        model = self._workplace.loaded(self._config.model, this.before.weights)
        inputs = self._workplace.noised(this.number)
        this.server_terms = distil(
            model,
            replace(best, kl_weight=this.rates.kl_weight),
            inputs,
            learning_rate=this.rates.learning_rate,
            streams=this.streams(self._config.seed),
            settings=self._config.federate,
        )
        self._weights = get_state(model)
        try:
            return public_logits(model, inputs)
        except ValueError as error:
            raise SamfedError(
                f"round {this.number}: the server's model broke ({error}); "
                "lower federate.learning_rate"
            ) from error

    def fit_request(self, this: Round, client: str) -> FitRequest:
        """Return a request to train on from the client's own weights."""
        distilled = client in self._heard
        return FitRequest(**this.address(client), rates=this.rates, distilled=distilled)

    def finish(self, this: Round) -> State:
        """Return the weights of the server's model."""
        return self._weights

    def conclude(self, run: RunFolder, weights: State) -> None:
        """Keep no model and no example: no client's network is here."""


def _logits(reply: Reply) -> Tensor:
    if reply.logits is None or reply.fault:
        raise ValueError(reply.fault or "there are none")
    return reply.logits
