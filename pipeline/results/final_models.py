"""The final models of a run: one for all clients, or each client's own."""

from __future__ import annotations

from torch import nn

from pipeline.config import Config, NetworkConfig
from pipeline.federation.runs import RunFolder
from pipeline.segmentation.networks import build_model


class FinalModels:
    """Loads the models of a finished run by the client that they answer for."""

    def __init__(self, run: RunFolder, made: Config, clients: list[str]) -> None:
        """``made`` is the run's own configuration, ``clients`` all of its clients in order.

        Raises:
            StageError: the run is not complete.
        """
        self._run = run
        self._made = made
        self._clients = clients
        self._shared = None if made.heterogeneous else self._load("global", made.model)

    def of(self, client: str) -> nn.Module:
        """The model that answers for ``client``'s images."""
        if self._shared is not None:
            return self._shared
        return self._load(client, self._made.network_of(self._clients.index(client)))

    def _load(self, name: str, network: NetworkConfig) -> nn.Module:
        weights = self._run.load_model(name)
        # pretrained weights would be overwritten, and their file need not be here any more
        network = network.model_copy(update={"encoder_weights": None})
        model = build_model(self._made, seed=self._made.seed, network=network)
        model.load_state_dict(weights)
        return model
