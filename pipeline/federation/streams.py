"""The random streams of a run: one for each purpose, party and round, none of which meet.

Each is a ``numpy.random.SeedSequence`` of the run's seed with a spawn key of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "participants",  # which clients take part in a round
    "labelled rows",  # images of D_p in each batch
    "labelled views",  # their views
    "unlabelled rows",  # a client's own images in each batch
    "unlabelled views",  # their views
    "dropout",  # of local updates and of training on D_p
    "public noise",  # of the round's copy of D_p
    "fusion rows",  # images of that copy in each batch
    "fusion dropout",
    "shuffled labels",  # of the control method
    "consistency views",  # on which a model's labels should not change
]
_KEYS = {purpose: key for key, purpose in enumerate(get_args(Purpose))}


@dataclass(frozen=True)
class Streams:
    """The random streams of one party in one round."""

    seed: int  # of the run
    party: int = 0  # 0 is the server, 1 + index a client
    round_number: int = 0  # 0 is what comes before the rounds

    @classmethod
    def of_client(cls, seed: int, index: int, round_number: int) -> Streams:
        """Return those of client ``index`` (from 0), whatever order clients run in."""
        return cls(seed, 1 + index, round_number)

    def rng(self, purpose: Purpose) -> np.random.Generator:
        """Return the stream of a purpose, from its beginning."""
        return np.random.default_rng(self._sequence(purpose))

    def word(self, purpose: Purpose) -> int:
        """Return 64 bits for a generator that is not NumPy's; torch's on the CPU takes 32 of them.

        So it is for what may repeat, as dropout's masks: what decides who learns from which image
        comes from ``rng``.
        """
        return int(self._sequence(purpose).generate_state(1, np.uint64)[0])

    def _sequence(self, purpose: Purpose) -> np.random.SeedSequence:
        key = _KEYS[purpose], self.party, self.round_number
        return np.random.SeedSequence(self.seed, spawn_key=key)
