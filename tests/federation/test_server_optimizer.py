"""Server optimisers against numbers worked out by hand and Flower's, and their memory in a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from watched_engines import Watched, changed, models

from pipeline.config import Config, FederateConfig
from pipeline.federation.messages import AnyRequest, Reply
from pipeline.federation.server import federate
from pipeline.federation.server_optimizer import Moments, server_step
from pipeline.segmentation.networks import State


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def play(rounds: list[State], start: State, **settings: Any) -> list[State]:
    """Return the weights after each round, whose aggregates are given; ``w`` alone is trained."""
    moments: Moments = {}
    played = [start]
    for aggregated in rounds:
        weights, moments = server_step(
            played[-1], aggregated, moments, trained=["w"], settings=FederateConfig(**settings)
        )
        played.append(weights)
    return played[1:]


def test_momentum_by_hand() -> None:
    """D = 2, m = 2, w = 2; then D = 1, m = 0.5 * 2 + 1 = 2, w = 4. Statistics are as aggregated."""
    start = {"w": double(0), "mean": double(0), "count": torch.tensor(1)}
    rounds = [{"w": double(w), "mean": double(7), "count": torch.tensor(5)} for w in (2, 3)]
    played = play(rounds, start, server_optimizer="fedavgm", server_momentum=0.5)
    assert [each["w"].item() for each in played] == [2, 4]
    assert [each["mean"].item() for each in played] == [7, 7]
    assert played[1]["count"].item() == 5
    slow = {"server_optimizer": "fedavgm", "server_momentum": 0.0, "server_learning_rate": 0.25}
    assert play(rounds, start, **slow)[0]["w"].item() == 0.5


def test_adam_by_hand() -> None:
    """D = 4, m = 0.5 * 4 = 2, v = 0.25 * 16 = 4, w = 10 + 0.1 * 2 / (2 + 2) = 10.05."""
    settings = {"server_momentum": 0.5, "server_beta2": 0.75, "server_tau": 2.0}
    (played,) = play(
        [{"w": double(14)}],
        {"w": double(10)},
        server_optimizer="fedadam",
        server_learning_rate=0.1,
        **settings,
    )
    assert played["w"].item() == pytest.approx(10.05, abs=1e-12)


def test_no_optimiser_gives_what_was_aggregated() -> None:
    rounds = [{"w": double(2)}]
    assert play(rounds, {"w": double(0)}) == rounds
    same = play(rounds, {"w": double(0)}, server_optimizer="fedavgm")  # its first round at rate 1
    assert same == rounds


#: Means of two clients in three rounds, and what flwr 1.42.0's strategies make of them.
START = (1.0, -2.0, 0.5)
ROUNDS = [(1.1, -2.2, 0.4), (1.3, -2.1, 0.3), (1.2, -2.1, 0.2)]
FEDAVGM = [(1.05, -2.1, 0.45), (1.22, -2.19, 0.33), (1.363, -2.226, 0.157)]
FEDADAM = [
    (1.0674963444003154, -2.0707104560384257, 0.43250365559968473),
    (1.1455084147022465, -2.133746696741732, 0.35197022519811316),
    (1.219907986061379, -2.1756541754638064, 0.2651701818061595),
]


def test_fedavgm_agrees_with_flowers() -> None:
    """FedAvgM(server_learning_rate=0.5, server_momentum=0.9)."""
    settings = {"server_optimizer": "fedavgm", "server_learning_rate": 0.5, "server_momentum": 0.9}
    played = play([{"w": double(*each)} for each in ROUNDS], {"w": double(*START)}, **settings)
    for found, expected in zip(played, FEDAVGM, strict=True):
        assert found["w"].tolist() == pytest.approx(expected, abs=1e-12)


def test_fedadam_agrees_with_flowers() -> None:
    """FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3), which corrects the bias in its rate."""
    weights: State = {"w": double(*START)}
    moments: Moments = {}
    for number, (aggregated, expected) in enumerate(zip(ROUNDS, FEDADAM, strict=True), start=1):
        correction = math.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        settings = FederateConfig(server_optimizer="fedadam", server_learning_rate=0.1 * correction)
        weights, moments = server_step(
            weights, {"w": double(*aggregated)}, moments, trained=["w"], settings=settings
        )
        assert weights["w"].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_stopped_run_goes_on_with_its_moments(labelled: Config) -> None:
    """The checkpoint of round 1 has them: without, round 2 would begin from nothing."""
    settings = {"server_optimizer": "fedadam", "rounds": 2}
    whole = federate(changed(labelled, "whole", **settings))
    seen: list[int] = []

    def crash(request: AnyRequest, reply: Reply) -> Reply:
        seen.append(reply.round_number)
        if reply.round_number == 2:
            raise KeyboardInterrupt
        return reply

    config = changed(labelled, "stopped", **settings)
    with pytest.raises(KeyboardInterrupt):
        federate(config, connect=Watched(crash).connect)
    stopped = federate(config, mode="resume")
    assert models(stopped) == models(whole)
    checkpoint, plain = whole.load_checkpoint(), federate(changed(labelled, "plain"))
    assert checkpoint is not None
    assert set(checkpoint.moments) == {"m", "v"}
    assert models(plain) != models(whole)
