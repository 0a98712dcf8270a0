"""The server start: first models, trained on D_p alone, kept in ``cache/starts/``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from pipeline.cohort import code_digest, network_key
from pipeline.config import Config, NetworkConfig
from pipeline.files import file_sha256
from pipeline.models import State
from pipeline.runs import load_state, save_state
from pipeline.schedule import Progress
from pipeline.training import cosine, train_on_server
from pipeline.views import ServerData


def first_model(
    config: Config,
    network: NetworkConfig,
    model: nn.Module,
    server: ServerData,
    *,
    progress: Progress | None,
) -> State:
    """``model``, a ``network``, after ``start_steps`` steps on D_p's training part.

    It is trained once for all runs whose settings that decide it are equal, whatever the method.
    """
    settings, steps = config.federate, config.federate.start_steps
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
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    used = ("start_steps", "labelled_batch", "learning_rate", "weight_decay", "threads", "device")
    chosen = {
        "seed": config.seed,
        "data": {key: settings["data"][key] for key in ("num_classes", "image_size")},
        "model": network_key(network),
        "federate": {key: settings["federate"][key] for key in used},
        "partition": file_sha256(config.cache.root / "partition.json"),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
