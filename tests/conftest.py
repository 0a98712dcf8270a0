"""A tiny generated data set and settings under which the whole pipeline takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, parse_config
from pipeline.data.synthetic import write_dataset

TINY = {
    "data": {"image_size": 32},
    "synth": {"images_per_site": 8, "size_px": 48},
    "partition": {
        "server_images": 6,
        "calibration_min": 2,
        "val_fraction": 0.15,
        "test_fraction": 0.3,
        "server_site": None,
    },
    "sam": {"epochs": 1, "batch_size": 2, "lora_rank": 2, "points_per_side": 3},
    # one epoch makes no teacher that is worth a warning
    "precompute": {"batch_size": 3, "warn_consistency": 0, "warn_empty": 1},
    "model": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "federate": {
        "rounds": 2,
        "pretrain_steps": 2,
        "local_steps": 2,
        "labelled_batch": 2,
        "unlabelled_batch": 2,
        "threads": 1,
    },
}


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input folder; tests only read it."""
    folder = tmp_path_factory.mktemp("input") / "images"
    write_dataset(folder, images_per_site=8, size_px=48, seed=0)
    return folder


def tiny_config(root: Path, cache: Path, **sections: object) -> Config:
    """Settings for ``root`` and ``cache``, with whole sections or single keys replaced."""
    raw = json.loads(json.dumps(TINY))
    raw["data"]["root"] = str(root)
    raw["cache"] = {"root": str(cache)}
    for name, value in sections.items():
        if isinstance(value, dict):
            raw.setdefault(name, {}).update(value)
        else:
            raw[name] = value
    return parse_config(raw, source="test")


@pytest.fixture
def config(tiny_images: Path, tmp_path: Path) -> Config:
    """Tiny settings with an empty cache."""
    return tiny_config(tiny_images, tmp_path / "cache")


def write_params(path: Path, config: Config) -> Path:
    """Write ``config`` as a params file."""
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return path
