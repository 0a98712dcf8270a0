"""Settings that cannot work, or do not suit the images, found before anything long is run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pipeline.config import Config, NetworkConfig
from pipeline.data.folder import IMAGE_SUFFIXES
from pipeline.errors import ConfigError
from pipeline.segmentation.networks import build_model

log = logging.getLogger("samfed.setup")

_GENERATED = re.compile(r"site_[a-d]_\d{4}")  # ids of `samfed synth`
_DEMO_PX = 64


def check_networks(config: Config) -> None:
    """Build every network once, without weights from files, which may come later.

    Raises:
        ConfigError: one cannot be built; names the clients that have it, and the value.
    """
    for name, network in _networks(config):
        without = network.model_copy(update={"encoder_weights": None})
        try:
            build_model(config, seed=0, network=without)
        except ConfigError as error:
            raise ConfigError(f"{name}: {str(error).removeprefix('model: ')}") from error


def name_traps(config: Config) -> None:
    """Log a warning for each setting that suits only the generated images."""
    for line in traps(config):
        log.warning("%s", line)


def traps(config: Config) -> list[str]:
    """Return a line for each setting that is valid and yet hardly what anybody wants."""
    found = []
    if not _is_generated(config.data.root):
        if config.data.image_size <= _DEMO_PX:
            found.append(
                f"data.image_size: {config.data.image_size} px suit the generated images alone; "
                "for others take 128 or more"
            )
        scratch = [name for name, each in _networks(config) if each.encoder_weights is None]
        if scratch:
            found.append(
                f"{scratch[0]}.encoder_weights: null, so that the encoder starts from random "
                "weights, which suits the generated images alone; give the encoder's timm weights"
            )
    if config.sam.variant.startswith("timm:") and config.sam.checkpoint is None:
        found.append(
            f"sam.checkpoint: null, so that {config.sam.variant} starts from random weights and "
            "learns from the server's images alone; give the backbone's timm weights"
        )
    return found


def _networks(config: Config) -> list[tuple[str, NetworkConfig]]:
    """Return each network with its key in the settings; the global one is always used."""
    own = enumerate(config.model.clients)
    return [("model", config.model), *((f"model.clients.{i} (client {i + 1})", n) for i, n in own)]


def _is_generated(root: Path) -> bool:
    """Tell whether no image in ``root`` is anything but generated."""
    files = (root / "images").glob("*")
    images = [path.stem for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    return all(_GENERATED.fullmatch(name) for name in images)
