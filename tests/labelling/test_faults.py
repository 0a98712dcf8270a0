"""Stage one against what may go wrong around it: kills, full and read-only disks, lost images.

Each time the next run goes on where the last one stopped, and the stores end in the same bytes.
(Ctrl-C, changed images and two writers: ``test_precompute``. Damage: ``test_maintenance``.)
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from kills import StageOnes, counting_steps, stage_ones
from noise_cache import config, finished, run, settings, whole
from teachers import content, labelled_rows

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.labelling.maintenance import verify
from pipeline.stores.label_store import LabelStore

__all__ = ["config", "finished", "stage_ones", "whole"]  # fixtures

HERE = Path(__file__).parent
KILLS = 20


def forget(config: Config) -> None:
    """Back to nothing labelled."""
    shutil.rmtree(config.cache.root / "sam", ignore_errors=True)


def test_kill_9_at_20_moments(
    config: Config, whole: dict[str, bytes], stage_ones: StageOnes
) -> None:
    """Spread over a run, from the first file that it flushes to its last mark."""
    forget(config)
    with counting_steps() as steps:
        run(config)
    assert content(config.cache.root / "sam") == whole
    total, stopped = labelled_rows(config), set()
    for number in range(KILLS):
        forget(config)
        assert stage_ones.run(config, kill_at=1 + number * len(steps) // KILLS) == -9
        before = labelled_rows(config)
        stopped.add(before)
        result, images = run(config)
        assert result.already_labelled == before
        assert result.labelled == images == total - before
        assert content(config.cache.root / "sam") == whole
    assert {0} < stopped  # some before the first done mark, some after


def test_a_read_only_cache(config: Config, whole: dict[str, bytes], stage_ones: StageOnes) -> None:
    """Root may write anywhere, so that the run is another user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(config.data.root, folder / "data")
        shutil.copytree(config.cache.root, folder / "cache")
        there = settings(folder / "data", folder / "cache")
        forget(there)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        before = content(folder)
        for path in folders:
            path.chmod(0o555)
        user = 65534 if os.geteuid() == 0 else None
        try:
            assert os.strerror(stage_ones.run(there, user=user)) == "Permission denied"
            assert content(folder) == before
        finally:
            for path in folders:
                path.chmod(0o755)
        assert stage_ones.run(there) == 0
        assert content(folder / "cache" / "sam") == whole


# --------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("size", [600, 13000])  # bytes: metadata does not fit; a chunk does not
def test_a_full_disk(config: Config, whole: dict[str, bytes], size: int) -> None:
    """Writing fails in the midst of a file, as on a full disk; what is there stays sound."""
    forget(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sam = config.cache.root / "sam"
    at = ".server.zarr.building/masks/zarr.json" if size == 600 else "site.zarr/confidences/c.0.0.0"
    assert caught.value.filename == str(sam / at)
    assert list(sam.rglob("*.samfed-tmp")) == list(sam.glob(".*")) == []
    assert verify(config).faults == []
    before = labelled_rows(config)
    assert before in ([0] if size == 600 else [2, 38])  # the next chunk is smaller, if it came
    result, images = run(config)
    assert (result.already_labelled, images) == (before, result.labelled)
    assert content(config.cache.root / "sam") == whole


# --------------------------------------------------------------------------- images


def test_an_image_that_went_and_came_back(
    config: Config, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """It is named at the end, the others are labelled, and later only it is."""
    root = tmp_path / "data"
    shutil.copytree(config.data.root, root)
    config = settings(root, config.cache.root)
    forget(config)
    partition = load_partition(config.cache.root / "partition.json")
    path = root / partition.images[partition.clients["site"].train[70]].image
    good = path.read_bytes()
    path.unlink()
    result, images = run(config)
    assert [line.split(": ")[0] for line in result.failed] == [str(path)]
    store = LabelStore(config.cache.root / "sam" / "site.zarr")
    assert [row for row, done in enumerate(store.done()) if not done] == [70]
    assert verify(config).faults == []
    path.write_bytes(good)
    result, images = run(config)
    assert (result.failed, result.labelled, images) == ([], 1, 1)
    assert content(config.cache.root / "sam") == whole


@pytest.mark.parametrize("kind", ["EACCES", "EIO", "ESTALE", "broken link"])
def test_an_image_that_cannot_be_read(
    config: Config,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """It is never called damaged; the others are labelled, and it is when it can be read again."""
    root = tmp_path / "data"
    shutil.copytree(config.data.root, root)
    config = settings(root, config.cache.root)
    forget(config)
    partition = load_partition(config.cache.root / "partition.json")
    path = root / partition.images[partition.clients["site"].train[70]].image
    read = Path.read_bytes

    def refuse(this: Path) -> bytes:
        if this == path:
            number = getattr(errno, kind)
            raise OSError(number, os.strerror(number), str(this))
        return read(this)

    with monkeypatch.context() as patch:
        if kind == "broken link":
            path.rename(tmp_path / "there")
            path.symlink_to(tmp_path / "gone")
        else:
            patch.setattr(Path, "read_bytes", refuse)
        result, images = run(config)
    (line, count) = result.failures()
    assert line.startswith(f"{path}: cannot be read (")
    assert count == "1 images have no label; the others are done"
    assert (result.labelled, images) == (labelled_rows(config), labelled_rows(config))
    if kind == "broken link":
        path.unlink()
        (tmp_path / "there").rename(path)
    assert run(config)[1] == 1
    assert content(config.cache.root / "sam") == whole


# --------------------------------------------------------------------------- another teacher


@pytest.mark.parametrize(
    "change", [{"adapter_sha256": "c" * 64}, {"prompt": "points"}, {"image_size": 32}]
)
def test_another_teacher_and_back(
    config: Config, whole: dict[str, bytes], change: dict[str, Any]
) -> None:
    """The first labels return without being computed again."""
    total = labelled_rows(config)
    other = config
    if "image_size" in change:
        data = config.data.model_copy(update=change)
        other, change = config.model_copy(update={"data": data}), {}
    assert run(other, **change)[1] == total
    assert labelled_rows(config) == total
    assert content(config.cache.root / "sam") != whole
    result, images = run(config)
    assert (result.labelled, images) == (0, 0)
    assert len(result.notices) == 2
    assert content(config.cache.root / "sam") == whole
    assert run(other, **change)[1] == 0
