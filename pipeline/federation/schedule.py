"""What a round's number decides: rates, weights, seeds, and who takes part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.config import Config
from pipeline.federation.local_update import cosine


class Progress(Protocol):
    """Who is told how far a run is: ``done`` of ``total`` rounds or steps, and a note on it."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Show it."""


def learning_rate(config: Config, number: int) -> float:
    """Of round ``number`` (from 1): a cosine over the rounds."""
    return config.federate.learning_rate * cosine(number - 1, config.federate.rounds)


def unlabelled_weight(config: Config, number: int) -> float:
    """lambda_u of round ``number``: linear over ``ramp_rounds``, then constant."""
    ramp = config.federate.ramp_rounds
    return config.federate.unlabelled_weight * (min(1.0, number / ramp) if ramp else 1.0)


def participants(config: Config, count: int, number: int) -> Sequence[int]:
    """Indices, ascending, of the clients that take part in round ``number``."""
    wanted = config.federate.clients_per_round
    if wanted is None or wanted >= count:
        return range(count)
    drawn = _generator(config.seed, 4, number).choice(count, size=wanted, replace=False)
    return sorted(int(index) for index in drawn)


def client_seed(seed: int, number: int, index: int) -> int:
    """Seed of a client's round: independent streams, whatever order clients run in."""
    return _seed(seed, 3, number, index)


def server_seed(seed: int, number: int) -> int:
    """Seed of the server's own work in a round."""
    return _seed(seed, 5, number)


def exchange_seed(seed: int, number: int) -> int:
    """Seed of the noise on a round's public images; it is sent to every client."""
    return _seed(seed, 6, number)


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _generator(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(words))
