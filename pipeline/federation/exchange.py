"""Rounds of clients with networks of their own: predictions on D_p cross the border, not weights.

Order of a round (HSSF, Ma et al., IEEE TMI 2024): every client speaks, its logits on a noised copy
of D_p; the server condenses them into its own model and answers with that model's logits; every
client takes these in, then trains on its own images. ``fedmd`` answers with the mean of the
clients' logits instead. ``supervised``, ``sam_only`` and ``oracle`` exchange nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config, NetworkConfig
from pipeline.errors import ConfigError, SamfedError
from pipeline.federation.aggregation import check_update
from pipeline.federation.agreement import AgreementState
from pipeline.federation.codistillation import (
    BestClient,
    MeanLogits,
    PublicTraining,
    distil,
    noised_public,
    public_logits,
)
from pipeline.federation.codistillation_losses import Consensus, GradedLogits
from pipeline.federation.diagnostics import (
    client_warnings,
    finite,
    mean_dice,
    report,
    round_warnings,
)
from pipeline.federation.inputs import RunInputs
from pipeline.federation.local_update import (
    LocalResult,
    local_update,
    make_optimizer,
    measure_calibration,
)
from pipeline.federation.pretraining import first_model
from pipeline.federation.runs import Checkpoint
from pipeline.federation.schedule import (
    Progress,
    client_seed,
    exchange_seed,
    learning_rate,
    participants,
    server_seed,
    unlabelled_weight,
)
from pipeline.federation.views import ServerData
from pipeline.methods import METHODS
from pipeline.segmentation.networks import State, build_model, get_state
from pipeline.stores.image_store import ImageSet

_SEED_BYTES = 8  # what a client needs to make the round's noised copy of D_p


@dataclass(frozen=True)
class Message:
    """All that crosses the border, either way: logits on D_p (N, K+1, S, S) float16."""

    logits: Tensor

    @property
    def nbytes(self) -> int:
        """Uncompressed."""
        return self.logits.nbytes


class PublicSet:
    """D_p as its owners hold it, and the round's noised copy, made once while the seed stays."""

    def __init__(self, server: ServerData) -> None:
        self.labels = server.labels
        self._images = server.images
        self._seed: int | None = None
        self._noised = torch.zeros(0)

    def noised(self, seed: int) -> Tensor:
        """``noised_public`` of the images; not to be changed."""
        if seed != self._seed:
            self._noised, self._seed = noised_public(self._images, seed=seed), seed
        return self._noised


class Site:
    """One client: its network, its images and its labels stay in here."""

    def __init__(
        self, config: Config, data: RunInputs, public: PublicSet, index: int, model: nn.Module
    ) -> None:
        self._config = config
        self._public = public
        self._client = data.clients[index]
        self._server = data.server
        self._index = index
        self._model = model

    def speak(self, weights: State, *, seed: int) -> Message:
        """Logits on the copy of D_p that ``seed`` noises.

        Raises:
            ValueError: they are not finite.
        """
        self._model.load_state_dict(weights)
        return Message(public_logits(self._model, self._public.noised(seed)))

    def listen(
        self, weights: State, answer: Message, number: int, *, seed: int
    ) -> tuple[State, dict[str, float]]:
        """Train ``weights`` on the server's answer: RF, or FedMD's digest; also its terms."""
        self._model.load_state_dict(weights)
        terms = self._take_in(answer, number, seed)
        return get_state(self._model), {f"fusion_{name}": value for name, value in terms.items()}

    def _take_in(self, answer: Message, number: int, seed: int) -> dict[str, float]:
        settings = self._config.federate
        rate = learning_rate(self._config, number)
        training = PublicTraining(
            inputs=self._public.noised(seed),
            optimizer=make_optimizer(self._model, rate, settings.weight_decay),
            generator=torch.Generator().manual_seed(self._seed(number) + 2),
            epochs=settings.fusion_epochs,
            batch_size=settings.labelled_batch,
        )
        if settings.method == "fedmd":
            return distil(self._model, Consensus(answer.logits), training=training)
        weight = fusion_weight(self._config, number)
        teacher = GradedLogits.of(answer.logits, self._public.labels, kl_weight=weight)
        return distil(self._model, teacher, training=training)

    def train(self, weights: State, state: AgreementState, number: int) -> LocalResult:
        """The local update, from the client's own weights; there is no broadcast model."""
        config = self._config
        self._model.load_state_dict(weights)
        calibration = measure_calibration(self._model, self._server, config)
        return local_update(
            self._model,
            weights,
            self._client,
            self._server,
            replace(state, calibration=calibration),
            config=config.federate,
            agreement=config.agreement,
            learning_rate=learning_rate(config, number),
            unlabelled_weight=unlabelled_weight(config, number),
            seed=self._seed(number),
            distil=False,
        )

    def _seed(self, number: int) -> int:
        return client_seed(self._config.seed, number, self._index)


@dataclass
class _Talk:
    """What an exchange leaves behind; without one, nothing."""

    weights: State  # of the server's model
    answer: Message | None = None
    spoke: dict[int, tuple[int, float]] = field(default_factory=dict)  # bytes and seconds
    server: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Exchange:
    """Heterogeneous clients: RC and RF, FedMD, or no exchange at all, by the method."""

    def __init__(self, config: Config, data: RunInputs, device: torch.device) -> None:
        self._config = config
        self._data = data
        _check_fits(config, data)
        networks = [config.network_of(index) for index in range(len(data.clients))]
        # one of each kind: whoever uses it loads a client's weights first
        built = {each: _build(config, each).to(device) for each in dict.fromkeys(networks)}
        self._models = [built[network] for network in networks]
        self._global = _build(config, config.model).to(device)
        self._public = PublicSet(data.server)
        self._sites = [Site(config, data, self._public, *each) for each in enumerate(self._models)]

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where one of the networks cannot be built."""
        for network in (config.model, *config.model.clients):
            _build(config, network)

    def start(self, progress: Progress | None) -> Checkpoint:
        """Every network, the server's too, trained on D_p; equal networks start equal."""
        config, clients, server = self._config, self._data.clients, self._data.server

        def first(network: NetworkConfig, model: nn.Module) -> State:
            return first_model(config, network, model, server, progress=progress)

        models = {
            client.name: first(config.network_of(index), self._models[index])
            for index, client in enumerate(clients)
        }
        weights = first(config.model, self._global)
        initial = AgreementState.initial(config.data.num_classes).as_tensor()
        states = {client.name: initial for client in clients}
        return Checkpoint(0, weights, states, self._data.partition, models)

    def play(self, before: Checkpoint, number: int) -> tuple[Checkpoint, dict[str, Any]]:
        """Exchange, then every participant's local update."""
        config = self._config
        chosen = participants(config, len(self._sites), number)
        talk = self._talk(before, number, chosen) if _exchanges(config) else _Talk(before.weights)
        models, states = dict(before.client_weights), dict(before.client_states)
        clients: dict[str, Any] = {}
        warnings, rejected = talk.warnings, []
        for index in chosen:
            name = self._data.clients[index].name
            result, clients[name] = self._turn(before, number, index, talk)
            broken = check_update(result.weights, before.client_weights[name])
            if broken is not None:
                rejected.append(f"{name}: update rejected, {broken}")
                continue
            models[name], states[name] = result.weights, result.state.as_tensor()
            warnings += client_warnings(config, name, clients[name])
        if len(rejected) == len(chosen):
            raise SamfedError(
                f"round {number}: no client has a usable update ({rejected[0]}); "
                "lower federate.learning_rate"
            )
        warnings += rejected
        warnings += round_warnings(config, clients)
        entry = {
            "round": number,
            "unlabelled_weight": unlabelled_weight(config, number),
            "learning_rate": learning_rate(config, number),
            "clients": {name: finite(each) for name, each in clients.items()},
            "server": finite(talk.server),
            "warnings": warnings,
        }
        return Checkpoint(number, talk.weights, states, before.partition, models), entry

    def validate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Mean Dice of each client's own model on its own validation part."""

        def loaded() -> Iterator[tuple[str, nn.Module, ImageSet]]:
            for client, model in zip(self._data.clients, self._models, strict=True):
                if client.name in self._data.validation:
                    model.load_state_dict(checkpoint.client_weights[client.name])
                    yield client.name, model, self._data.validation[client.name]

        return mean_dice(loaded(), self._config)

    def models(self, checkpoint: Checkpoint) -> dict[str, State]:
        """Every client's own model."""
        return dict(checkpoint.client_weights)

    def _talk(self, before: Checkpoint, number: int, chosen: Sequence[int]) -> _Talk:
        """Hear every participant, in order, and answer. One message is in memory at a time."""
        settings, labels = self._config.federate, self._public.labels
        seed, classes = exchange_seed(self._config.seed, number), self._config.data.num_classes
        mean = MeanLogits(labels, num_classes=classes)
        best = BestClient(labels, num_classes=classes)
        talk = _Talk(before.weights)
        for index in chosen:
            name, began = self._data.clients[index].name, time.perf_counter()
            try:
                message = self._sites[index].speak(before.client_weights[name], seed=seed)
                (mean if settings.method == "fedmd" else best).add(message.logits)
            except ValueError as error:
                talk.warnings.append(f"{name}: predictions rejected, {error}")
                continue
            talk.spoke[index] = message.nbytes, time.perf_counter() - began
        if not talk.spoke:
            raise SamfedError(
                f"round {number}: no client sent usable predictions ({talk.warnings[0]}); "
                "lower federate.learning_rate"
            )
        if settings.method == "fedmd":
            talk.answer = Message(mean.result())
            return talk
        return self._condense(best.result(), number, seed, talk)

    def _condense(self, best: GradedLogits, number: int, seed: int, talk: _Talk) -> _Talk:
        """RC on the server's model, whose logits are the answer."""
        config, settings = self._config, self._config.federate
        inputs, rate = self._public.noised(seed), learning_rate(config, number)
        self._global.load_state_dict(talk.weights)
        training = PublicTraining(
            inputs=inputs,
            optimizer=make_optimizer(self._global, rate, settings.weight_decay),
            generator=torch.Generator().manual_seed(server_seed(config.seed, number)),
            epochs=settings.fusion_epochs,
            batch_size=settings.labelled_batch,
        )
        teacher = replace(best, kl_weight=fusion_weight(config, number))
        terms = distil(self._global, teacher, training=training)
        try:
            answer = Message(public_logits(self._global, inputs))
        except ValueError as error:
            raise SamfedError(
                f"round {number}: the server's model broke ({error}); lower federate.learning_rate"
            ) from error
        return replace(talk, weights=get_state(self._global), answer=answer, server=terms)

    def _turn(
        self, before: Checkpoint, number: int, index: int, talk: _Talk
    ) -> tuple[LocalResult, dict[str, Any]]:
        """A participant takes in the answer, if it spoke, and trains; also its report."""
        name, site = self._data.clients[index].name, self._sites[index]
        sent, seconds = talk.spoke.get(index, (0, 0.0))
        began = time.perf_counter()
        weights, received = before.client_weights[name], 0
        taken: dict[str, float] = {}
        if talk.answer is not None and index in talk.spoke:
            seed = exchange_seed(self._config.seed, number)
            weights, taken = site.listen(weights, talk.answer, number, seed=seed)
            received = talk.answer.nbytes + _SEED_BYTES
        state = AgreementState.from_tensor(before.client_states[name])
        result = site.train(weights, state, number)
        result.diagnostics |= taken
        seconds += time.perf_counter() - began
        return result, report(result, seconds=seconds, bytes_up=sent, bytes_down=received)


def fusion_weight(config: Config, number: int) -> float:
    """Weight of the KL term of RC and RF in round ``number``; 0 while it warms up."""
    settings = config.federate
    return settings.fusion_weight if number > settings.fusion_warmup_rounds else 0.0


def _exchanges(config: Config) -> bool:
    """Whether clients send predictions at all."""
    return METHODS[config.federate.method].exchange != "none"


def _check_fits(config: Config, data: RunInputs) -> None:
    """Raise ConfigError where the networks do not fit the clients, or D_p no batch."""
    networks, clients = len(config.model.clients), len(data.clients)
    if networks > clients:
        raise ConfigError(
            f"model.clients: found {networks} networks for {clients} clients; list at most one for "
            "each"
        )
    if _exchanges(config) and len(data.server.images) < 2:
        raise ConfigError(
            f"D_p's training part has {len(data.server.images)} image, expected at least 2 to "
            f"train on predictions ({config.federate.method}); raise partition.server_images"
        )


def _build(config: Config, network: NetworkConfig) -> nn.Module:
    return build_model(config, seed=config.seed, network=network)
