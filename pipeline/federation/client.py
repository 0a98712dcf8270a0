"""One client: it owns its images, its labels and its private state, and answers requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.errors import StageError
from pipeline.federation.aggregation import check_update
from pipeline.federation.agreement import Calibration
from pipeline.federation.audit import note_sent, sent_file
from pipeline.federation.codistillation import distil, public_logits
from pipeline.federation.compression import Packed, pack_update
from pipeline.federation.description import FEWEST_IMAGES, describe, public_moments, training_of
from pipeline.federation.examples import client_examples, public_examples
from pipeline.federation.exchange import EXCHANGES
from pipeline.federation.inputs import ClientContext, flip_dice, load_client, load_part
from pipeline.federation.local_update import LocalResult, LocalTask, local_update
from pipeline.federation.messages import (
    AnyRequest,
    ClientEntry,
    DescribeRequest,
    DistilRequest,
    EvaluateRequest,
    FitRequest,
    PredictRequest,
    Reply,
    Request,
)
from pipeline.federation.pretraining import first_model
from pipeline.federation.privacy import Noise, noise_key, private_update
from pipeline.federation.runs import RoundFiles, RunFolder
from pipeline.federation.streams import Streams
from pipeline.federation.targets import measure_calibration
from pipeline.federation.views import as_tensor
from pipeline.federation.weight_average import WeightAverage
from pipeline.federation.workplace import Workplace
from pipeline.methods import METHODS
from pipeline.segmentation.likeness import (
    Statistics,
    moments,
    pooled_features,
    statistics,
    threshold_of,
    usual_distance,
)
from pipeline.segmentation.metrics import dice_score
from pipeline.segmentation.model_spec import ModelSpec
from pipeline.segmentation.networks import get_state, predict_masks
from pipeline.stores.image_store import ImageSet
from pipeline.stores.plain_data import Plain, State, load

# the round at hand, the one it builds on, and one more: a server keeps two checkpoints, and may
# repeat a round from either
_KEPT_ROUNDS = 3


@dataclass(frozen=True)
class PrivateState(Plain):
    """What a client keeps of a round for itself."""

    round: int
    weights: State | None  # of its own network, where it has one
    residual: State = field(default_factory=dict)  # what compression left out of its updates
    average: WeightAverage = field(default_factory=WeightAverage)  # of its own network, last rounds


class Client:
    """Answers requests from its own data; nothing else of it can be seen."""

    def __init__(self, context: ClientContext, workplace: Workplace) -> None:
        """Read the client's stores.

        Args:
            workplace: what the clients of this process share.
        """
        self._context, self._config = context, context.config
        self._workplace, self._public = workplace, workplace.public
        self._network = context.config.network_of(context.index)
        self._data = load_client(context)
        self._parts = {"val": load_part(context, "val")} if context.val else {}
        self._run = RunFolder(context.run)
        self._private = self._run.private(context.name)
        self._states = RoundFiles(self._private, kept=_KEPT_ROUNDS)
        # between distillation and local update
        self._distilled = RoundFiles(self._private, kept=1, stem="distilled")
        counts = len(self._data.images), len(context.val)
        quality = None if self._config.privacy.on else flip_dice(context)
        #: What the server knows of it.
        self.entry = ClientEntry(context.name, *counts, flip_dice=quality)
        self._note("entry", 0, vars(self.entry))

    def answer(self, request: AnyRequest) -> Reply:
        """Return the reply to any request; the same request gives the same reply.

        Raises:
            StageError: the private state of the round that the request names is gone.
        """
        began, number = time.perf_counter(), request.round_number
        kind = type(request).__name__.removesuffix("Request").lower()
        try:
            reply = self._answer(request)
        except Exception as error:  # of which the server is told
            self._note(kind, number, {"error": str(error)})
            raise
        if self._config.privacy.on:  # what is measured on its images is no part of the promise
            reply = replace(reply, metrics={}, features=None)
        reply = replace(reply, seconds=time.perf_counter() - began)
        self._note(kind, number, vars(reply))
        return reply

    def _note(self, kind: str, number: int, answer: dict[str, Any]) -> None:
        """Write down what is about to leave."""
        cache, run = self._config.cache.root, self._config.federate.name
        note_sent(sent_file(cache, run, self._context.name), kind, number, answer)

    def _answer(self, request: AnyRequest) -> Reply:
        match request:
            case FitRequest():
                return self._fit(request)
            case PredictRequest():
                return self._predict(request)
            case DistilRequest():
                return self._distil(request)
            case EvaluateRequest():
                return self._evaluate(request)
            case DescribeRequest():
                return self._describe(request)

    def _fit(self, request: FitRequest) -> Reply:
        """Train on its own images, from the broadcast weights or from its own."""
        before = self._after_distillation(request) if request.distilled else self._before(request)
        weights, packing = self._received(request), self._config.federate.compression
        start = _present(before.weights if weights is None else weights)
        model = self._workplace.loaded(self._network, start)
        task = LocalTask(
            weights=start,
            calibration=self._calibration(request, model),
            learning_rate=request.rates.learning_rate,
            unlabelled_weight=request.rates.unlabelled_weight,
            streams=self._streams(request),
        )
        result = local_update(model, self._public, self._data, task, config=self._config)
        # what is not finite is never kept; others' weights are checked again where they arrive
        fault = check_update(result.weights, start)
        after: State | Packed = result.weights
        if fault is None:
            sent, residual = self._noised(result.weights, start, model), before.residual
            after = sent
            if weights is not None and packing != "none":
                after, residual = pack_update(sent, start, residual, packing)
            self._keep(request, result, replace(before, residual=residual))
        return request.reply(
            metrics=result.metrics,
            fault=fault or "",
            images=len(self._data.images),
            weights=None if weights is None else after,
        )

    def _noised(self, update: State, before: State, model: nn.Module) -> State:
        """Return an update as it may leave: with noise, where the settings want it here."""
        settings = self._config.privacy
        if settings.mode != "client":
            return update
        return private_update(
            update,
            before,
            trained=[name for name, _ in model.named_parameters()],
            settings=settings,
            noise=Noise(noise_key(self._config.cache.root), self._context.name),
        )

    def _predict(self, request: PredictRequest) -> Reply:
        """Predict on the round's noised copy of D_p."""
        weights = _present(self._before(request).weights)
        model = self._workplace.loaded(self._network, weights)
        try:
            logits = public_logits(model, self._workplace.noised(request.round_number))
        except ValueError as error:
            return request.reply(fault=str(error))
        return request.reply(logits=logits)

    def _distil(self, request: DistilRequest) -> Reply:
        """Train its own network on the server's logits, by RF or as FedMD does."""
        before = self._before(request)
        model = self._workplace.loaded(self._network, _present(before.weights))
        rule = EXCHANGES[METHODS[self._config.federate.method].exchange]
        teacher = rule.teacher(request.logits, self._public.labels, request.rates)
        terms = distil(
            model,
            teacher,
            self._workplace.noised(request.round_number),
            learning_rate=request.rates.learning_rate,
            streams=self._streams(request),
            settings=self._config.federate,
        )
        after = replace(before, round=request.round_number, weights=get_state(model))
        self._distilled.save(request.round_number, after, before=0)
        metrics = {f"fusion_{name}": value for name, value in terms.items()}
        return request.reply(metrics=metrics)

    def _evaluate(self, request: EvaluateRequest) -> Reply:
        """Score the model that answers for its images; keep what the run leaves behind."""
        state = self._before(request)
        weights = self._received(request) or self._own(state, request.round_number)
        model = self._workplace.frozen(self._network, weights)
        if request.final:
            self._conclude(request, replace(state, weights=weights), model)
        if request.part is None or not getattr(self._context, request.part):
            return request.reply()  # a client without masks has nothing to score
        if request.part not in self._parts:
            self._parts[request.part] = load_part(self._context, request.part)
        part = self._parts[request.part]
        dice = mean_dice(model, part, num_classes=self._config.data.num_classes)
        return request.reply(metrics={"dice": dice}, images=len(part))

    def _conclude(self, request: EvaluateRequest, state: PrivateState, model: nn.Module) -> None:
        """Keep example images; where its network is its own, keep the model too.

        D_p's examples are the first client's where no model is shared: the server has none of them.
        """
        calibration = self._calibration(request, model)
        examples = client_examples(model, self._data, calibration, config=self._config)
        if request.weights is None:
            self._run.save_model(_present(state.weights), self._own_spec(model), self._context.name)
            if self._context.index == 0:
                examples = [
                    *public_examples(model, self._public, calibration, config=self._config),
                    *examples,
                ]
        self._run.save_examples(examples, self._context.name)
        self._distilled.drop_after(0)

    def _describe(self, request: DescribeRequest) -> Reply:
        """Tell sums over pooled features, or how far the images lie from the sums of all."""
        model = self._workplace.frozen(self._network, request.weights)
        if request.statistics is None:
            images = self._data.images
            if len(images) < FEWEST_IMAGES:
                return request.reply()
            own = moments(pooled_features(model, images))
            return request.reply(features=own.as_tensor(), images=own.count)
        given = Statistics(0, request.statistics[0], request.statistics[1:])
        return request.reply(metrics={"distance": self._distance(model, given)})

    def _distance(self, model: nn.Module, given: Statistics) -> float:
        """Return how far its validation images, or else its training images, usually lie."""
        part = self._parts.get("val")
        images = self._data.images if part is None else as_tensor(part)
        return usual_distance(pooled_features(model, images), given)

    def _own_spec(self, model: nn.Module) -> ModelSpec:
        """Describe its own model from its own images and D_p."""
        config, images = self._config, self._data.images
        own = moments(pooled_features(model, images))
        given = statistics([public_moments(model, self._public), own])
        training = training_of(config, self._public, images=len(images))
        return describe(
            model,
            self._public,
            given.with_threshold(threshold_of([self._distance(model, given)])),
            config=config,
            network=self._network,
            training=training.model_copy(update={"client": self._context.name}),
        )

    def _calibration(self, request: FitRequest | EvaluateRequest, model: nn.Module) -> Calibration:
        """Return the calibration of the model's weights, which a server of all may have sent."""
        if request.calibration is not None:
            return request.calibration
        return measure_calibration(model, self._public, self._config)

    def _received(self, request: FitRequest | EvaluateRequest) -> State | None:
        """Return the weights that a request brings, if any."""
        if request.weights is None:
            return None
        return self._workplace.unpacked(self._network, request.weights)

    def _streams(self, request: Request) -> Streams:
        return Streams.of_client(self._config.seed, self._context.index, request.round_number)

    # ----------------------------------------------------------------------- private state

    def _before(self, request: Request) -> PrivateState:
        """Return the state that the request builds on; the first model's before any round."""
        if request.state_round:
            return self._load(self._states.path(request.state_round), request.state_round)
        weights, context = None, self._context
        if self._config.heterogeneous:
            weights = first_model(
                self._config, self._network, self._public, public_sha256=context.public.sha256
            )
        return PrivateState(0, weights)

    def _after_distillation(self, request: FitRequest) -> PrivateState:
        """Return the state after the distillation of the request's round."""
        return self._load(self._distilled.path(request.round_number), request.round_number)

    def _load(self, path: Path, number: int) -> PrivateState:
        restart = "federate --restart"
        state = load(path, PrivateState, stage=restart) if path.is_file() else None
        if state is None or state.round != number:
            raise StageError(
                f"{path}: found {'nothing' if state is None else f'round {state.round}'}, expected "
                f"the client's own state of round {number}; run `samfed federate --restart`"
            )
        return state

    def _own(self, state: PrivateState, number: int) -> State:
        """Return the weights of its own network that count after a round: at last, the mean."""
        weights = _present(state.weights)
        over = number == self._config.federate.played_rounds
        return state.average.mean(weights) if over else weights

    def _keep(self, request: FitRequest, result: LocalResult, before: PrivateState) -> None:
        """Keep the state after a round, its own network's weights included."""
        number, own, average = request.round_number, None, before.average
        if request.weights is None:
            own = result.weights
            average = average.after(number, own, settings=self._config.federate)
        state = PrivateState(number, own, before.residual, average)
        self._states.save(number, state, before=request.state_round)


def mean_dice(model: nn.Module, part: ImageSet, *, num_classes: int) -> float:
    """Return the mean Dice over a part's images, all of which have labels."""
    if part.labels is None:
        raise StageError("a part to score has no labels in its store; run `samfed prepare` again")
    predicted = predict_masks(model, as_tensor(part)).numpy()
    pairs = zip(predicted, part.labels, strict=True)
    return float(np.mean([dice_score(mask, true, num_classes=num_classes) for mask, true in pairs]))


def _present(weights: State | None) -> State:
    if weights is None:
        raise ValueError("the request brings no weights, and the client has no network of its own")
    return weights
