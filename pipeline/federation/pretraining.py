"""First models, trained on D_p alone before round 1 and kept in ``cache/starts/``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from pipeline.config import Config, NetworkConfig
from pipeline.deciding import deciding_settings, network_settings
from pipeline.federation.inputs import RESULT_VERSION
from pipeline.federation.local_update import cosine, train_on_server
from pipeline.federation.streams import Streams
from pipeline.federation.views import PublicSet
from pipeline.progress import Progress
from pipeline.runtime import resolve_device
from pipeline.segmentation.networks import build_for_training
from pipeline.stores.plain_data import State, load, save


def first_model(
    config: Config,
    network: NetworkConfig,
    public: PublicSet,
    *,
    public_sha256: str,
    keep: bool = True,
    progress: Progress | None = None,
) -> State:
    """Return the weights of ``network`` after ``pretrain_steps`` steps on D_p's training part.

    It is trained once for all runs and clients whose settings that decide it are equal, whatever
    the method.

    Args:
        public_sha256: of D_p's files and parts (``Partition.server_sha256``).
        keep: write it to the cache, for whoever asks next.
    """
    settings, steps = config.federate, config.federate.pretrain_steps
    path = config.cache.root / "starts" / f"{start_key(config, network, public_sha256)}.safetensors"
    if path.is_file():
        return load(path, State)

    def rates() -> Iterator[float]:
        for step in range(steps):
            yield settings.pretrain_learning_rate * cosine(step, steps)
            if progress is not None:  # the step is done
                progress(
                    f"server start: {network.architecture}, {network.encoder}", step + 1, steps
                )

    model = build_for_training(config, network, resolve_device(settings.device))
    weights = train_on_server(model, public, rates(), streams=Streams(config.seed), config=config)
    if keep:
        save(path, weights)
    return weights


def start_key(config: Config, network: NetworkConfig, public_sha256: str) -> str:
    """Return a sha256 over what decides a first model, its first 16 hexadecimal digits."""
    chosen = deciding_settings(config, "first_model") | {
        "model": network_settings(network),
        "public": public_sha256,
        "version": RESULT_VERSION,
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
