"""Fine-tuning that diverges, stops or finds the disk full: the teacher that was there stays."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import pytest
import torch
from conftest import PREPARED, copy_cache, digest, fails, tiny_config, write_params
from forks import Forks
from PIL import Image

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.errors import CorruptStoreError, DataError, NotFiniteError
from pipeline.sam.finetune import CHECKPOINT, finetune

TIMM = {"variant": "timm:test_resnet", "input_size": 64}


def with_sam(config: Config, **changed: Any) -> Config:
    """Unchecked, as limits of settings must not be all that keeps a training from diverging."""
    return config.model_copy(update={"sam": config.sam.model_copy(update=changed)})


class Stop:
    """Progress that stops the training as Ctrl-C does, before the step after so many."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.steps = after, list[int]()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.steps.append(done)
        if done == self.after:
            raise KeyboardInterrupt


# --------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    ("changed", "rates"),
    [
        ({}, "sam.learning_rate 1e+30"),
        (TIMM, "sam.learning_rate 1e+30 and sam.encoder_learning_rate 1e+30"),
    ],
    ids=["vit_t", "timm"],
)
def test_a_training_that_diverges_leaves_the_teacher(
    adapted: Config, changed: dict[str, Any], rates: str
) -> None:
    fast = {"learning_rate": 1e30, "encoder_learning_rate": 1e30, "warmup_fraction": 0.0}
    config = with_sam(adapted, epochs=2, batch_size=1, **fast, **changed)
    before = digest(config.cache.root / "teacher")
    with pytest.raises(NotFiniteError) as caught:
        finetune(config)
    line = str(caught.value)
    assert line.startswith("the teacher diverged in epoch 1 of 2: the loss is ")
    assert line.endswith(f"; lower {rates}")
    assert digest(config.cache.root / "teacher") == before
    assert not (config.cache.root / CHECKPOINT).exists()


def test_weights_that_the_last_step_of_an_epoch_breaks(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss has seen them yet."""
    step = torch.optim.AdamW.step

    def break_one(self: torch.optim.AdamW, *given: Any) -> None:
        step(self)
        self.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", break_one)
    config = with_sam(prepared, batch_size=100)  # one step an epoch
    with pytest.raises(NotFiniteError, match=r"in epoch 1 of 1: '[\w.]+' is not finite; lower"):
        finetune(config)
    assert not (config.cache.root / "teacher").exists()


def test_divergence_on_the_command_line(adapted: Config, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", adapted)
    before = digest(adapted.cache.root / "teacher")
    line = fails(1, "finetune-sam", "--params", params, "--set", "sam.learning_rate=1e30")
    assert line.startswith("the teacher diverged in epoch 1 of 1: its probabilities for image '")
    assert digest(adapted.cache.root / "teacher") == before


# --------------------------------------------------------------------------- stops


@pytest.fixture(params=["vit_t", "timm"])
def training(request: pytest.FixtureRequest, prepared: Config) -> Config:
    """Settings of three epochs, of LoRA or of a whole teacher with batch normalisation."""
    return with_sam(prepared, epochs=3, batch_size=1, **(TIMM if request.param == "timm" else {}))


def test_a_training_that_stops_goes_on_to_the_same_bytes(training: Config, tmp_path: Path) -> None:
    """Ctrl-C in the second epoch: only the first one's steps are not repeated."""
    whole, log = copy_cache(training, tmp_path / "whole", PREPARED), Stop()
    finetune(whole, progress=log)
    each = len(log.steps) // 3
    assert log.steps == list(range(1, 3 * each + 1))
    with pytest.raises(KeyboardInterrupt):
        finetune(training, progress=Stop(after=2 * each - 1))
    assert not (training.cache.root / "teacher").exists()
    finetune(training, progress=(rest := Stop()))
    assert rest.steps == log.steps[each:]
    teachers = [digest(config.cache.root / "teacher") for config in (training, whole)]
    assert teachers[0] == teachers[1]
    assert not (training.cache.root / CHECKPOINT).parent.exists()


def test_a_stop_after_the_teacher_was_written(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is still there: nothing is trained again, and the bytes are the same."""
    config = with_sam(prepared, epochs=2, **TIMM)

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sam.finetune.discard", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    before = digest(config.cache.root / "teacher")
    assert before
    finetune(config, progress=(rest := Stop()))
    assert rest.steps == []
    assert digest(config.cache.root / "teacher") == before
    assert not (config.cache.root / CHECKPOINT).exists()


def test_kill_9_after_an_epoch(prepared: Config, tmp_path: Path, forks: Forks) -> None:
    config = with_sam(prepared, epochs=3, batch_size=1)
    whole = copy_cache(config, tmp_path / "whole", PREPARED)
    params = write_params(tmp_path / "params.yaml", config)
    process = forks.start("samfed", "finetune-sam", "--params", params)
    while not (config.cache.root / CHECKPOINT).exists():
        assert process.is_running()
        time.sleep(0.001)
    process.kill(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finetune(config, progress=(rest := Stop()))
    finetune(whole, progress=(log := Stop()))
    assert len(rest.steps) < len(log.steps)
    assert digest(config.cache.root / "teacher") == digest(whole.cache.root / "teacher")


@pytest.mark.parametrize("changed", [{"epochs": 3}, {"learning_rate": 0.01}, {"lora_rank": 1}])
def test_a_stopped_training_of_other_settings_is_not_continued(
    prepared: Config, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    caplog.set_level("INFO", "samfed")
    with pytest.raises(KeyboardInterrupt):
        finetune(with_sam(prepared, epochs=2, batch_size=1), progress=Stop(after=3))
    finetune(
        with_sam(prepared, **{"epochs": 2, "batch_size": 1, **changed}), progress=(log := Stop())
    )
    assert log.steps[0] == 1
    assert caplog.messages == [
        "beginning anew: the training that was stopped had other settings or images"
    ]


def test_a_damaged_checkpoint_is_named(prepared: Config) -> None:
    config = with_sam(prepared, epochs=2, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, progress=Stop(after=3))
    path = config.cache.root / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptStoreError) as caught:
        finetune(config)
    assert str(caught.value) == (
        f"{path}: damaged (sha256 differs); delete it and run `samfed finetune-sam`"
    )


@pytest.mark.parametrize("size", [1 << 12, 1 << 18])  # bytes: nothing fits; the adapter does not
def test_a_full_disk(adapted: Config, tmp_path: Path, size: int) -> None:
    """One line that names the file; the teacher that was there stays."""
    before = digest(adapted.cache.root / "teacher")
    params = write_params(tmp_path / "params.yaml", adapted)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        line = fails(1, "finetune-sam", "--params", params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"{adapted.cache.root}/")
    assert ": File too large; " in line
    assert digest(adapted.cache.root / "teacher") == before
    assert list(adapted.cache.root.rglob("*.samfed-tmp")) == []


def test_a_server_set_without_foreground_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_images, root)
    for path in (root / "masks").iterdir():
        Image.open(path).point(lambda _: 0).save(path)
    config = tiny_config(root, tmp_path / "cache")
    prepare(config)
    with pytest.raises(DataError) as caught:
        finetune(config)
    assert str(caught.value).startswith("the server's train part: none of its 2 masks has any fo")
    assert not (tmp_path / "cache" / "teacher").exists()


def test_threads_are_pinned_and_given_back(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = set[int](), torch.get_num_threads()
    config = with_sam(prepared, threads=before + 1, **TIMM)
    finetune(config, progress=lambda *_: seen.add(torch.get_num_threads()))
    assert seen == {before + 1}
    assert torch.get_num_threads() == before
