"""Stage one with several views and class probabilities, from the settings to the reader."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from dask_processes import thread_workers
from noise_cache import finished, settings
from numpy.typing import NDArray
from teachers import FakeTeacher, content, on_workers, run, stand_in, teacher_of

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.public import export_public, import_public
from pipeline.errors import IdentityError
from pipeline.federation.inputs import load_inputs
from pipeline.labelling.maintenance import info, verify
from pipeline.labelling.precompute import precompute
from pipeline.labelling.repair import repair
from pipeline.sam.teacher import load_teacher
from pipeline.stores.label_store import LabelStore
from pipeline.stores.optional_arrays import read_probabilities, read_view_agreement
from pipeline.stores.pseudo_labels import PseudoLabels

__all__ = ["finished"]  # a fixture

Change = Callable[..., Config]


class Viewer(FakeTeacher):
    """Labels by threshold, and says what several views would."""

    def label(self, images: Sequence[NDArray[np.uint8]], size: int) -> PseudoLabels:
        plain = super().label(images, size)
        sure = np.stack([255 - plain.confidences, plain.confidences], axis=1)
        agreement = plain.predicted_iou / 2
        more = {"view_agreement": agreement, "flip_dice": agreement / 2, "probabilities": sure}
        return PseudoLabels(**{name: v for name, v in vars(plain).items() if v is not None} | more)


def asked(config: Config, **changes: object) -> Config:
    """Return the settings with these of stage one."""
    run = config.precompute.model_copy(update=changes)
    return config.model_copy(update={"precompute": run})


@pytest.fixture
def noise(finished: Config, tmp_path: Path) -> Config:
    """Settings of a cache without labels that asks for views and probabilities."""
    cache = tmp_path / "cache"
    shutil.copytree(finished.cache.root, cache, ignore=shutil.ignore_patterns("sam", "archive"))
    return asked(settings(finished.data.root, cache), views=4, probabilities=True)


def viewer(config: Config) -> Viewer:
    teacher = Viewer()
    teacher.card = teacher_of(config).card
    return teacher


def test_views_label_the_same_rows_once(noise: Config) -> None:
    """Mirror images are among the views: no image is labelled once more to measure flips."""
    teacher = viewer(noise)
    result = run(noise, teacher, mirrors=True)
    assert result.labelled == teacher.images > 64
    path = noise.cache.root / "sam" / "site.zarr"
    store = LabelStore(path)
    agreement = read_view_agreement(path)
    assert np.array_equal(agreement, store.read().predicted_iou / 2)
    quality = [row.flip_dice for row in store.quality() if row is not None]
    assert quality == pytest.approx(agreement / 2, abs=1e-6)
    assert result.statistics["site"]["flips"] == len(store)
    sure = read_probabilities(path, range(len(store)))[:, 1]
    assert np.array_equal((sure * 255).round(), store.read().confidences)
    again = run(noise, viewer(noise), mirrors=True)
    assert (again.labelled, again.notices) == (0, [])
    assert run(asked(noise, probabilities=False), viewer(noise)).labelled == 0


def test_another_number_of_views_is_another_teacher(noise: Config) -> None:
    run(noise, viewer(noise))
    two = asked(noise, views=2)
    assert "views is 4, the run asks for 2" in run(two, viewer(two)).notices[0]
    with pytest.raises(IdentityError, match="views is 2, the run asks for 1"):
        check(asked(noise, views=1))
    back = run(noise, viewer(noise))
    assert back.labelled == 0
    assert "took back labels" in back.notices[0]


def check(config: Config) -> None:
    """Read a client's labels as stage two would."""
    contexts = load_inputs(config).contexts
    contexts[0].data(contexts[0].name, f"images/{contexts[0].name}/train", contexts[0].train)


def test_one_damaged_probability_is_found_and_mended(
    noise: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(noise, viewer(noise))
    stand_in(monkeypatch, viewer(noise))
    whole = content(noise.cache.root / "sam")
    file = noise.cache.root / "sam" / "site.zarr" / "probabilities" / "c.0.0.0.0"
    damaged = bytearray(file.read_bytes())
    damaged[40] ^= 2
    file.write_bytes(bytes(damaged))
    (fault,) = verify(noise).faults
    assert (fault.what, fault.reason) == ("probabilities", "damaged")
    mended = repair(noise)
    assert (mended.labelled, mended.remaining) == (64, [])
    assert content(noise.cache.root / "sam") == whole
    (store, *_) = [each for each in info(noise).stores if each.owner == "site"]
    assert (store.probabilities, store.differs) == (True, [])
    assert "labels 16 px, 4 views, with class probabilities, 1 class(es)" in store.text()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(noise: Config) -> None:
    run(noise, viewer(noise))
    whole = content(noise.cache.root / "sam")
    shutil.rmtree(noise.cache.root / "sam")

    def stop(batch: int) -> None:
        if batch == 5:
            raise KeyboardInterrupt

    stopped = viewer(noise)
    stopped.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        run(noise, stopped)
    assert content(noise.cache.root / "sam") != whole
    rest = viewer(noise)
    run(noise, rest)
    assert 0 < rest.images < stopped.images + rest.images
    assert content(noise.cache.root / "sam") == whole


def check_shared(config: Config, cache: Path) -> None:
    """Share D_p and its labels with a site, which has the very store then."""
    file = config.cache.root.with_name("public.samfed")
    export_public(config, file)
    site = config.cache.model_copy(update={"root": cache})
    import_public(config.model_copy(update={"cache": site}), file)
    server = Path("sam") / "server.zarr"
    assert content(cache / server) == content(config.cache.root / server)


# --------------------------------------------------------------------------- a real teacher


def test_a_real_teacher_by_the_settings(adapted: Config) -> None:
    config = asked(adapted, views=8, probabilities=True, precision="fp32", threads=1)
    result = precompute(config)
    assert result.failed == []
    path = config.cache.root / "sam" / "site_a.zarr"
    store = LabelStore(path)
    assert store.identity.views == 8
    agreement, labels = read_view_agreement(path), store.read()
    assert ((agreement >= 0) & (agreement <= 1)).all()
    found = read_probabilities(path, range(len(store)))
    assert np.array_equal((found.max(axis=1) * 255).round(), labels.confidences)
    assert verify(config).faults == []
    check_shared(config, config.cache.root.with_name("site"))
    here = content(config.cache.root / "sam")
    shutil.rmtree(config.cache.root / "sam")
    with thread_workers() as workers:
        precompute(config, cluster=on_workers(workers))
    assert content(config.cache.root / "sam") == here
    one = load_teacher(asked(config, views=1), load_partition(config.cache.root / "partition.json"))
    assert one.views == 1
