"""What a round's number decides: rates, weights, and who takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.federation.aggregation import fewest_updates
from pipeline.federation.local_update import cosine
from pipeline.federation.streams import Streams


@dataclass(frozen=True)
class Rates:
    """The numbers that change from round to round."""

    learning_rate: float
    unlabelled_weight: float  # lambda_u
    kl_weight: float  # of RC and RF; 0 while it warms up

    @classmethod
    def of(cls, config: Config, number: int) -> Rates:
        """Return those of round ``number`` (from 1).

        The learning rate follows a cosine over the rounds; lambda_u is linear over
        ``ramp_rounds``, then constant.
        """
        settings = config.federate
        ramp = min(1.0, number / settings.ramp_rounds) if settings.ramp_rounds else 1.0
        return cls(
            learning_rate=settings.learning_rate * cosine(number - 1, settings.played_rounds),
            unlabelled_weight=settings.unlabelled_weight * ramp,
            kl_weight=settings.fusion_weight if number > settings.fusion_warmup_rounds else 0.0,
        )


def check_participants(config: Config, clients: int) -> None:
    """Check that a round has as many clients as the settings need.

    Raises:
        ConfigError: it has fewer than ``min_clients``, or than the rule needs against ``byzantine``
            hostile ones.
    """
    settings = config.federate
    count, hostile, rule = settings.clients_per_round, settings.byzantine, settings.aggregation
    count = clients if count is None else min(count, clients)
    if count < settings.min_clients:
        raise ConfigError(
            f"federate.min_clients: found {settings.min_clients}, expected at most {count}, "
            "the clients of a round"
        )
    fewest = fewest_updates(rule, hostile)
    if count < fewest:
        raise ConfigError(
            f"federate.aggregation {rule}: found {count} clients in a round, expected at least "
            f"{fewest} for federate.byzantine {hostile}; take more clients, a smaller byzantine, "
            "or median"
        )


def participants(config: Config, names: Sequence[str], number: int) -> Sequence[str]:
    """Return the clients, in their order, that take part in round ``number``."""
    wanted, count = config.federate.clients_per_round, len(names)
    if wanted is None or wanted >= count:
        return names
    rng = Streams(config.seed, round_number=number).rng("participants")
    drawn = rng.choice(count, size=wanted, replace=False)
    return [names[int(index)] for index in sorted(drawn)]
