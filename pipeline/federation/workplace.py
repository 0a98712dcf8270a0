"""What the clients and the server of one process share: D_p and built networks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pipeline.config import Config, NetworkConfig
from pipeline.errors import ConfigError
from pipeline.federation.codistillation import noised_public
from pipeline.federation.compression import Packed, unpack
from pipeline.federation.streams import Streams
from pipeline.federation.views import PublicSet
from pipeline.methods import METHODS
from pipeline.segmentation.networks import State, build_for_training

Networks = dict[NetworkConfig, nn.Module]


def build_networks(config: Config, device: torch.device) -> Networks:
    """Build one network of each kind of the run: the server's, and the clients' own.

    Raises:
        ConfigError: one of them cannot be built, or has no batch norm where the method needs it.
    """
    method, trained = config.federate.method, config.model.clients or (config.model,)
    if METHODS[method].target == "batch_norm" and any(n.normalisation == "group" for n in trained):
        raise ConfigError(
            f"federate.method {method}: the clients' images teach batch norm alone, and a network "
            "has normalisation group; expected batch"
        )
    return {
        network: build_for_training(config, network, device)
        for network in dict.fromkeys((config.model, *config.model.clients))
    }


class Workplace:
    """D_p and one network of each kind; whoever uses a network gets it with their own weights.

    A use ends before the next one begins, as clients of one process take turns.
    """

    def __init__(self, config: Config, public: PublicSet, networks: Networks) -> None:
        self.public = public
        self._config = config
        self._networks = networks
        self._frozen: Networks = {}
        self._in_frozen: dict[NetworkConfig, State] = {}
        self._noised: tuple[int, Tensor] = (0, torch.zeros(0))
        self._unpacked: tuple[State | Packed, State] = ({}, {})

    def loaded(self, network: NetworkConfig, weights: State) -> nn.Module:
        """Return a network with ``weights``, to be trained."""
        model = self._networks[network]
        model.load_state_dict(weights)
        return model

    def frozen(self, network: NetworkConfig, weights: State) -> nn.Module:
        """Return another network with ``weights``, in evaluation mode, which nobody trains.

        It is loaded once for all who ask for the same weights, as the clients of a round do.
        """
        if network not in self._frozen:
            model = copy.deepcopy(self._networks[network])
            self._frozen[network] = model.eval().requires_grad_(False)
        if self._in_frozen.get(network) is not weights:
            self._frozen[network].load_state_dict(weights)
            self._in_frozen[network] = weights
        return self._frozen[network]

    def unpacked(self, network: NetworkConfig, weights: State | Packed) -> State:
        """Return a network's weights, unpacked once for all who got the same; not to be changed."""
        if isinstance(weights, dict):
            return weights
        if self._unpacked[0] is not weights:
            self._unpacked = weights, unpack(weights, self._networks[network].state_dict())
        return self._unpacked[1]

    def noised(self, round_number: int) -> Tensor:
        """Return the round's noised copy of D_p, made once a round; not to be changed."""
        if self._noised[0] != round_number:
            streams = Streams(self._config.seed, round_number=round_number)
            self._noised = (
                round_number,
                noised_public(self.public.images, seed=streams.word("public noise")),
            )
        return self._noised[1]
