"""``samfed cache show`` and ``cache export``: labels for eyes, and for other projects' viewers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import ome_zarr_models
import pytest
import zarr
from conftest import answer, call, fails, listing, write_params
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.errors import ConfigError
from pipeline.results.inspection import check_name
from pipeline.stores.arrays import read_rows
from pipeline.stores.image_store import ImageStore
from pipeline.stores.label_store import LabelStore

Options = tuple[object, ...]


@pytest.fixture
def options(shared_pipeline: Config, tmp_path: Path) -> Options:
    """Options of a command on the shared pipeline, which must not change."""
    return ("--params", write_params(tmp_path / "params.yaml", shared_pipeline))


def of(config: Config, client: str) -> tuple[LabelStore, ImageStore]:
    split = "calibration" if client == "server" else "train"
    store = LabelStore(config.cache.root / f"sam/{client}.zarr")
    return store, ImageStore(config.cache.root / f"images/{client}/{split}.zarr")


# --------------------------------------------------------------------------- show


def test_one_label_in_numbers_and_as_a_picture(
    shared_pipeline: Config, options: Options, tmp_path: Path
) -> None:
    store, images = of(shared_pipeline, "site_b")
    row, key = len(store) - 1, store.rows[-1]
    out = tmp_path / "shown.png"
    found = answer("cache", "show", "site_b", key.image_id, "--out", out, *options)
    rows = range(row, row + 1)
    mask = read_rows(store.path, store.arrays["masks"], rows)[0]
    sure = read_rows(store.path, store.arrays["confidences"], rows)[0] / 255
    for each in found["classes"]:
        where = mask == each["index"]
        assert each["share"] == where.mean()
        assert each["confidence"] == pytest.approx(sure[where].mean(), abs=0.01)
    assert {each["index"] for each in found["classes"]} == set(np.unique(mask).tolist())
    assert found["row"] == row
    assert found["identity"]["variant"] == "vit_t"
    picture = np.asarray(Image.open(out))
    assert picture.shape == (384, 3 * 384 + 2 * 8, 3)
    pixels = images.read(rows).images[0]
    assert np.array_equal(picture[:384:12, :384:12], pixels)  # the first of the three, enlarged


def test_what_a_person_reads(shared_pipeline: Config, options: Options, tmp_path: Path) -> None:
    """The server's image has a truth, whose outline is white on the label alone."""
    store, _ = of(shared_pipeline, "server")
    image_id, out = store.rows[0].image_id, tmp_path / "shown.png"
    shown = call("cache", "show", "server", image_id, "--out", out, *options)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0] == f"server, {image_id}: row 0, labelled by vit_t"
    assert " of the pixels, mean confidence 0." in lines[1]
    assert lines[-1] == f"image, label and confidence: {out}"
    picture = np.asarray(Image.open(out))
    white = (picture == 255).all(axis=-1)
    assert white[:, 392:776].any()


def test_the_picture_lies_in_the_cache(labelled: Config, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", labelled)
    store, _ = of(labelled, "site_c")
    found = answer("cache", "show", "site_c", store.rows[0].image_id, "--params", params)
    assert Path(found["picture"]) == (
        labelled.cache.root / "show" / "site_c" / f"{store.rows[0].image_id}.png"
    )
    assert Path(found["picture"]).is_file()


def test_names_that_are_not_there(shared_pipeline: Config, options: Options) -> None:
    assert fails(2, "cache", "show", "site_x", "a", *options) == (
        "no client is called 'site_x'; found server, site_a, site_b, site_c, site_d"
    )
    tested = load_partition(shared_pipeline.cache.root / "partition.json").clients["site_b"].test
    assert fails(2, "cache", "show", "site_b", tested[0], *options).startswith(
        f"no image of site_b that SAM labels is called '{tested[0]}'; found "
    )


def test_the_nearest_of_many_names_in_order() -> None:
    names = [f"site_{number:02}" for number in reversed(range(30))]
    with pytest.raises(ConfigError, match=r"found site_09, site_19, site_29, \.\.\.$"):
        check_name("client", "site_9", names)
    with pytest.raises(ConfigError, match=r"'x'; found site_00, site_01, site_02, \.\.\.$"):
        check_name("client", "x", names)


def test_a_picture_has_a_picture_s_name(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "label.txt"
    assert fails(2, "cache", "show", "site_b", "a", "--out", out, *options) == (
        f"--out {out}: a PNG is written there; expected a name with .png"
    )
    assert not out.exists()


def test_a_client_without_labels(prepared: Config, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", prepared)
    first = load_partition(prepared.cache.root / "partition.json").clients["site_b"].train[0]
    for command in (("show", "site_b", first), ("export", "--ome-zarr", tmp_path / "out")):
        text = fails(4, "cache", *command, "--params", params)
        assert text.endswith(".zarr: not found; run `samfed precompute-sam` first")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- export


def test_an_independent_reader_opens_the_export(
    shared_pipeline: Config, options: Options, tmp_path: Path
) -> None:
    """ome-zarr-models, another project's, takes image and labels for valid OME-Zarr 0.5."""
    out = tmp_path / "out"
    command = ("cache", "export", "--ome-zarr", out, "--client", "site_b", "--client", "server")
    found = answer(*command, *options)
    assert found["paths"] == [str(out / "site_b.ome.zarr"), str(out / "server.ome.zarr")]
    for client in ("site_b", "server"):
        store, images = of(shared_pipeline, client)
        rows = range(len(store))
        group = zarr.open_group(out / f"{client}.ome.zarr", mode="r")
        image = ome_zarr_models.open_ome_zarr(group)
        assert image.ome_zarr_version == "0.5"
        assert [axis.name for axis in image.attributes.ome.multiscales[0].axes] == list("tcyx")
        assert image.labels is not None
        assert image.labels.attributes.ome.labels == ["sam"]
        assert ome_zarr_models.open_ome_zarr(group["labels/sam"]).ome_zarr_version == "0.5"
        (colour,) = group["labels/sam"].attrs["ome"]["image-label"]["colors"]
        assert json.dumps(colour) == '{"label-value": 1, "rgba": [0, 229, 255, 255]}'
        pixels = images.read(rows).images
        assert np.array_equal(group["0"][:, :3], pixels.transpose(0, 3, 1, 2))
        for found_values, name in (
            (group["0"][:, 3], "confidences"),
            (group["labels/sam/0"][:], "masks"),
        ):
            assert np.array_equal(found_values, read_rows(store.path, store.arrays[name], rows))
        ids = [key.image_id for key in store.rows]
        assert group.attrs["samfed"]["image_ids"] == ids
    before = listing(out)
    text = fails(3, *command, *options)
    assert text == f"{out}/site_b.ome.zarr: is there already; move it away or choose another folder"
    assert listing(out) == before


def test_a_damaged_store_leaves_no_half_export(labelled: Config, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", labelled)
    (labelled.cache.root / "sam/site_b.zarr/masks/c.0.0.0").unlink()
    fails(
        5,
        "cache",
        "export",
        "--ome-zarr",
        tmp_path / "out",
        "--client",
        "site_b",
        "--params",
        params,
    )
    assert listing(tmp_path / "out") == {}


def test_without_the_extra(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaozarrs.write.v05", None)
    assert fails(2, "cache", "export", "--ome-zarr", tmp_path / "out", *options) == (
        "cache export: yaozarrs is not installed; run pip install 'samfed[ngff]'"
    )
    assert not (tmp_path / "out").exists()
