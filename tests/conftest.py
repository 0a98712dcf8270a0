"""What test files share: tiny images and settings, one finished pipeline, and the command line.

A test that reads asks for ``shared_pipeline``; a test that changes something asks for a copy of it
(``prepared``, ``adapted``, ``labelled`` or ``finished``) or copies the parts it needs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run on every core already
# where a test wants two threads all the same, they are not to spin while another test has the core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from filelock import FileLock
from forks import Forks, connected
from typer.testing import CliRunner

import cli
from pipeline.config import Config, NetworkConfig
from pipeline.params import parse_config
from pipeline.segmentation.model_spec import Calibration, Likeness, ModelSpec, Training

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
    "sam": {"epochs": 1, "batch_size": 2, "lora_rank": 2, "points_per_side": 3, "threads": 1},
    # one epoch makes no teacher that is worth a warning
    "precompute": {"batch_size": 3, "warn_consistency": 0, "warn_empty": 1},
    # one of timm's smallest: a step of such a network costs by its layers
    "model": {"encoder": "tu-test_byobnet", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "federate": {
        "rounds": 2,
        "pretrain_steps": 2,
        "local_steps": 2,
        "labelled_batch": 2,
        "unlabelled_batch": 2,
        "threads": 1,
    },
}

# hundreds of thousands of objects live as long as the tests: to look for rubbish among them again
# and again takes a tenth of the time
gc.set_threshold(50_000, 20, 50)

PREPARED = ("partition.json", "images", "oracle")
ADAPTED = (*PREPARED, "teacher")
LABELLED = (*ADAPTED, "sam")
FINISHED = (*LABELLED, "runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes: no worker of pytest-xdist is left alone with one.

    Files stay whole, as their fixtures are made once for each.
    """
    long = {item.path for item in items if "forks" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in long)


# --------------------------------------------------------------------------- settings


def tiny_config(root: Path, cache: Path, **sections: object) -> Config:
    """Return settings for ``root`` and ``cache``, with whole sections or single keys replaced."""
    raw = json.loads(json.dumps(TINY))
    raw["data"]["root"] = str(root)
    raw["cache"] = {"root": str(cache)}
    for name, value in sections.items():
        if isinstance(value, dict):
            raw.setdefault(name, {}).update(value)
        else:
            raw[name] = value
    return parse_config(raw, source="test")


def write_params(path: Path, config: Config) -> Path:
    """Write ``config`` as a params file."""
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return path


@pytest.fixture
def config(tiny_images: Path, tmp_path: Path) -> Config:
    """Tiny settings with an empty cache."""
    return tiny_config(tiny_images, tmp_path / "cache")


def tiny_spec() -> ModelSpec:
    """Return the description of a model whose two features are all the same to it."""
    return ModelSpec(
        samfed="0",
        weights_sha256="none",
        network=NetworkConfig(),
        num_classes=1,
        class_names=("foreground",),
        image_size=32,
        grey=False,
        temperature=1.0,
        calibration=Calibration(
            images=0,
            ece_before=0.0,
            ece=0.0,
            reliability={"pixels": [], "confidence": [], "accuracy": []},
        ),
        likeness=Likeness(images=1, mean=(0.0,), whitening=((1.0,),), threshold=1.0),
        training=Training(
            method="sam_fed", rounds=1, seed=0, client=None, clients=1, images=1, public_images=1
        ),
    )


# --------------------------------------------------------------------------- folders


def digest(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the sha256 of every file below ``folder``, but for the file names in ``leave_out``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


def listing(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder``, and an empty one for every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all workers of pytest-xdist share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return a folder that ``build`` has filled, once for all workers of pytest-xdist.

    Every worker reads the same folder: whoever needs it first builds it, the others wait.
    """
    base = shared_folder(factory)
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input folder; tests only read it."""
    from pipeline.data.synthetic import write_dataset

    def build(folder: Path) -> None:
        write_dataset(folder / "images", images_per_site=8, size_px=48, seed=0)

    return build_once(tmp_path_factory, "input", build) / "images"


# --------------------------------------------------------------------------- the pipeline


def run_stages(config: Config) -> None:
    """Run every stage from ``prepare`` to ``evaluate``."""
    import pipeline.sam  # noqa: F401  (before segment_anything and timm import torchvision)
    from pipeline.data.prepare import prepare
    from pipeline.federation.server import federate
    from pipeline.labelling.precompute import precompute
    from pipeline.results.evaluate import evaluate
    from pipeline.results.evaluate_teacher import evaluate_teacher
    from pipeline.sam.finetune import finetune

    prepare(config, with_oracle=True)
    finetune(config)
    evaluate_teacher(config)
    precompute(config)
    evaluate(config, federate(config))


@pytest.fixture(scope="session")
def shared_pipeline(
    tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Config]:
    """Settings of a pipeline on which every stage ran, with oracle labels; tests only read it."""
    folder = build_once(
        tmp_path_factory, "pipeline", lambda path: run_stages(tiny_config(tiny_images, path))
    )
    before = digest(folder)
    yield tiny_config(tiny_images, folder)
    assert digest(folder) == before, "a test has changed the pipeline that all tests share"


def copy_cache(config: Config, cache: Path, parts: tuple[str, ...] = FINISHED) -> Config:
    """Copy ``parts`` of the cache of ``config`` to ``cache``; return settings for the copy."""
    cache.mkdir(parents=True, exist_ok=True)
    for part in parts:
        source = config.cache.root / part
        if source.is_dir():
            shutil.copytree(source, cache / part)
        elif source.exists():  # the oracle's labels are not always made
            shutil.copy(source, cache)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"root": cache})})


@pytest.fixture
def prepared(shared_pipeline: Config, tmp_path: Path) -> Config:
    """Settings of a copy of the shared pipeline, as it was after ``prepare``."""
    return copy_cache(shared_pipeline, tmp_path / "cache", PREPARED)


@pytest.fixture
def adapted(shared_pipeline: Config, tmp_path: Path) -> Config:
    """Settings of a copy of the shared pipeline, as it was after ``finetune``."""
    return copy_cache(shared_pipeline, tmp_path / "cache", ADAPTED)


@pytest.fixture
def labelled(shared_pipeline: Config, tmp_path: Path) -> Config:
    """Settings of a copy of the shared pipeline, as it was after ``precompute``."""
    return copy_cache(shared_pipeline, tmp_path / "cache", LABELLED)


@pytest.fixture
def finished(shared_pipeline: Config, tmp_path: Path) -> Config:
    """Settings of a copy of the whole shared pipeline."""
    return copy_cache(shared_pipeline, tmp_path / "cache", FINISHED)


# --------------------------------------------------------------------------- the command line


@contextmanager
def log_kept() -> Iterator[None]:
    """The log, which commands set up, is then as it was before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def call(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    with log_kept():
        return CliRunner().invoke(cli.app, [*map(str, arguments)], input=stdin)


def fails(code: int, *arguments: object) -> str:
    """Run a command that must fail; return its one line on stderr, without the prefix."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr == lines[0] + "\n"
    return lines[0].removeprefix("error: ")


def answer(*arguments: object) -> dict[str, Any]:
    """Run a command with --json; stdout holds one object, which is returned, and nothing else."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Project:
    """A folder with settings, images and a cache, for the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.images = folder / "images"
        self.params = folder / "params.yaml"
        if not self.params.exists():  # else another worker made it, and perhaps reads it
            write_params(self.params, tiny_config(self.images, self.cache))

    @property
    def options(self) -> tuple[object, ...]:
        """The options that make a command use this project."""
        return ("--params", self.params)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Real processes that start without importing everything anew."""
    server = connected(shared_folder(tmp_path_factory))
    yield server
    server.close()
