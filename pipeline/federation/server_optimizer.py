"""Server optimisers: they take what a round changed for a gradient, and go on from the broadcast.

With ``D = aggregated - broadcast`` of the trained parameters, eta ``server_learning_rate``:

* ``fedavgm``: ``m = beta m + D``, ``w = w_0 + eta m`` (Hsu et al., 2019).
* ``fedadam``: ``m = beta m + (1 - beta) D``, ``v = beta_2 v + (1 - beta_2) D^2``,
  ``w = w_0 + eta m / (sqrt(v) + tau)`` (Reddi et al., 2021, who correct no bias).

Both begin with moments of 0. Batch norm's statistics are as they were aggregated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.config import FederateConfig, ServerOptimizer
from pipeline.segmentation.networks import State

Moments = dict[str, State]  # by their letter, then by parameter; as exact as the weights

#: Of each optimiser, where ``server_learning_rate`` is null.
LEARNING_RATES: Mapping[ServerOptimizer, float] = MappingProxyType(
    {"fedavgm": 1.0, "fedadam": 0.01}
)


def server_step(
    before: State,
    aggregated: State,
    moments: Moments,
    *,
    trained: Collection[str],
    settings: FederateConfig,
) -> tuple[State, Moments]:
    """Return the weights after a step from ``before``, and the moments for the next round.

    Args:
        moments: what the round before returned; empty before the first.
        trained: the names of the parameters; other entries are those of ``aggregated``.
    """
    kind = settings.server_optimizer
    if kind == "none":
        return aggregated, {}
    rate = settings.server_learning_rate or LEARNING_RATES[kind]
    weights, after = dict(aggregated), {letter: State() for letter in _LETTERS[kind]}
    for name in trained:
        old = before[name]
        change = aggregated[name].double() - old.double()
        zero = torch.zeros_like(old)
        known = [moments.get(letter, {}).get(name, zero).double() for letter in after]
        found = [each.to(old.dtype) for each in _next_moments(known, change, settings)]
        for letter, value in zip(after, found, strict=True):
            after[letter][name] = value
        step = found[0].double()
        if kind == "fedadam":
            step = step / (found[1].double().sqrt() + settings.server_tau)
        weights[name] = (old.double() + rate * step).to(old.dtype)
    return weights, after


_LETTERS: Mapping[ServerOptimizer, str] = MappingProxyType({"fedavgm": "m", "fedadam": "mv"})


def _next_moments(known: list[Tensor], change: Tensor, settings: FederateConfig) -> list[Tensor]:
    beta, second = settings.server_momentum, settings.server_beta2
    if settings.server_optimizer == "fedavgm":
        return [beta * known[0] + change]
    first = beta * known[0] + (1 - beta) * change
    return [first, second * known[1] + (1 - second) * change.square()]
