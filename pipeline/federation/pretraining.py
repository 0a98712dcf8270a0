"""The server start: first models, trained on D_p alone, kept in ``cache/starts/``."""

from __future__ import annotations

import hashlib
import json

from torch import nn

from pipeline.config import Config, NetworkConfig, deciding_settings, network_settings
from pipeline.disk import file_sha256
from pipeline.federation.inputs import RESULT_VERSION
from pipeline.federation.local_update import cosine, train_on_server
from pipeline.federation.runs import load_state, save_state
from pipeline.federation.schedule import Progress
from pipeline.federation.views import ServerData
from pipeline.segmentation.networks import State


def first_model(
    config: Config,
    network: NetworkConfig,
    model: nn.Module,
    server: ServerData,
    *,
    progress: Progress | None,
) -> State:
    """``model``, a ``network``, after ``pretrain_steps`` steps on D_p's training part.

    It is trained once for all runs whose settings that decide it are equal, whatever the method.
    """
    settings, steps = config.federate, config.federate.pretrain_steps
    path = config.cache.root / "starts" / f"{start_key(config, network)}.safetensors"
    if path.is_file():
        return load_state(path)

    def advance(step: int) -> None:
        if progress is not None:
            progress(f"server start: {network.architecture}, {network.encoder}", step, steps)

    state = train_on_server(
        model,
        server,
        config=settings,
        steps=steps,
        rate=lambda step: settings.learning_rate * cosine(step, steps),
        seed=config.seed,
        progress=advance,
    )
    save_state(path, state)
    return state


def start_key(config: Config, network: NetworkConfig) -> str:
    """sha256 over what decides a first model, first 16 hexadecimal digits."""
    chosen = deciding_settings(config, "first_model") | {
        "model": network_settings(network),
        "partition": file_sha256(config.cache.root / "partition.json"),
        "version": RESULT_VERSION,
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
