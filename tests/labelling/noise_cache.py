"""A small cache of one site whose images are noise, labelled by a stand-in for the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import tiny_config
from teachers import content, stand_in, teacher_of, write_noise
from teachers import run as run_with

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.labelling.precompute import StageOneResult, precompute

COUNT = 110  # two chunks of labels, the second one partly filled


def settings(root: Path, cache: Path) -> Config:
    return tiny_config(
        root,
        cache,
        partition={"val_fraction": 0.02, "test_fraction": 0.02},
        precompute={"batch_size": 16},
        sam={"variant": "fake"},
        data={"image_size": 16},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A cache that is whole; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    write_noise(folder / "data", count=COUNT, size=32)
    config = settings(folder / "data", folder / "cache")
    prepare(config, with_oracle=True)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, teacher_of(config))
        precompute(config)
    return config


@pytest.fixture
def config(finished: Config, tmp_path: Path) -> Config:
    """A copy of the whole cache, to be damaged."""
    shutil.copytree(finished.cache.root, tmp_path / "cache")
    return settings(finished.data.root, tmp_path / "cache")


@pytest.fixture
def whole(finished: Config) -> dict[str, bytes]:
    return content(finished.cache.root / "sam")


def run(config: Config, **changes: object) -> tuple[StageOneResult, int]:
    """Stage one by a teacher with these changes; also the number of images that it labelled."""
    teacher = teacher_of(config, **changes)
    return run_with(config, teacher), teacher.images
