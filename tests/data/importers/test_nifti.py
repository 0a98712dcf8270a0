"""NIfTI volumes become upright slices with their labels, spacing and patients."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from originals import write_nifti
from PIL import Image

from pipeline.data.folder import scan
from pipeline.data.importers.importing import import_data
from pipeline.data.importers.items import Options, parse_window
from pipeline.data.importers.sources import recognise
from pipeline.errors import ConfigError, DataError

Array = NDArray[Any]


def head() -> Array:
    """Values (Z, Y, X) of LPS: 200 at the front right of the lowest slice, else 0..99."""
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) % 100
    values[0, 0, 0] = 200
    return values


def write(path: Path, values: Array, **spacing: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, values, **spacing)
    return path


def pixels(folder: Path, image_id: str, kind: str = "images") -> Array:
    return np.asarray(Image.open(folder / kind / f"{image_id}.png"))


def spacing(folder: Path) -> dict[str, tuple[str, ...]]:
    with (folder / "spacing.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_id", "row_mm", "column_mm", "slice_mm"]
    return {name: tuple(rest) for name, *rest in rows[1:]}


WHOLE = Options(window=(100, 200))  # 0..200 becomes 0..255


def grey(values: Array) -> Array:
    return np.rint(values * (255 / 200)).astype(np.uint8)


def test_slices_are_those_acquired_and_patients_have_numbers(tmp_path: Path) -> None:
    labels = (head() > 50).astype(np.uint8) * 7
    for name in ("MILLER/t1.nii.gz", "MILLER/t2.nii.gz", "baker/t1.nii"):
        stem, _, ending = name.partition(".")
        write(tmp_path / "in" / name, head(), spacing=(0.5, 0.7, 5.0))
        write(tmp_path / "in" / f"{stem}_seg.{ending}", labels, spacing=(0.5, 0.7, 5.0))
    assert recognise(tmp_path / "in") == "nifti"
    result = import_data("nifti", tmp_path / "in", tmp_path / "out", options=WHOLE)
    ids = [
        f"p{p}_s{s}_i{i:03d}"
        for p, s in (("0001", "01"), ("0001", "02"), ("0002", "01"))
        for i in (1, 2, 3, 4)
    ]
    found = scan(result.folder).images
    assert list(found) == ids
    assert found["p0001_s02_i003"].group == "nifti/p0001"
    assert (result.images, result.masks, result.groups, result.classes) == (12, 12, 2, 1)
    for index in range(4):
        name = f"p0002_s01_i{index + 1:03d}"
        np.testing.assert_array_equal(pixels(result.folder, name), grey(head()[index]))
        mask = pixels(result.folder, name, "masks")
        np.testing.assert_array_equal(mask, labels[index] > 0)  # its only value, 7, is class 1
    assert set(spacing(result.folder).values()) == {("0.7", "0.5", "5")}
    written = b"".join(p.read_bytes() for p in result.folder.rglob("*") if p.is_file())
    assert b"MILLER" not in written
    assert b"baker" not in written


@pytest.mark.parametrize("code", ["RAS", "LPI", "SAL", "PIR"])
def test_any_order_of_axes_gives_the_same_upright_slices(tmp_path: Path, code: str) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(head())
    image.SetSpacing((1.0, 1.0, 3.0))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.DICOMOrient(image, code), str(tmp_path / "in" / "a.nii.gz"))
    result = import_data("nifti", tmp_path / "in", tmp_path / "out", options=WHOLE)
    assert result.images == 4
    for index in range(4):
        found = pixels(result.folder, f"p0001_s01_i{index + 1:03d}")
        np.testing.assert_array_equal(found, grey(head()[index]))


@pytest.mark.parametrize(
    ("axis", "expected", "count", "mm"),
    [
        ("axial", lambda v: v[0], 4, ("2", "1", "3")),
        ("coronal", lambda v: v[::-1, 0], 5, ("3", "1", "2")),  # head up
        ("sagittal", lambda v: v[::-1, :, 0], 6, ("3", "2", "1")),
    ],
)
def test_planes_are_cut_as_they_are_read(
    tmp_path: Path, axis: str, expected: Any, count: int, mm: tuple[str, ...]
) -> None:
    write(tmp_path / "in" / "a.nii", head(), spacing=(1.0, 2.0, 3.0))
    options = Options(axis=axis, window=(100, 200))
    result = import_data("nifti", tmp_path / "in", tmp_path / "out", options=options)
    assert result.images == count
    np.testing.assert_array_equal(pixels(result.folder, "p0001_s01_i001"), grey(expected(head())))
    assert spacing(result.folder)["p0001_s01_i001"] == mm


def test_without_a_window_percentiles_of_the_volume_are_black_and_white(tmp_path: Path) -> None:
    values = np.zeros((2, 40, 50), np.float32)
    values[0], values[1] = np.linspace(-1000, 0, 2000).reshape(40, 50), 500
    values[0, 0, 0] = -30000  # one bad voxel does not make all others white
    write(tmp_path / "in" / "a.nii.gz", values, spacing=(1.0, 1.0, 1.0))
    result = import_data("nifti", tmp_path / "in", tmp_path / "out")
    first, second = (pixels(result.folder, f"p0001_s01_i00{n}") for n in (1, 2))
    assert first[0, 0] == 0
    assert (second == 255).all()  # and a slice is not stretched by itself
    assert 160 < first.max() < 175


def test_empty_slices_stay_unless_told(tmp_path: Path) -> None:
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[2, 1, 1], labels[3, 1, 1] = 2, 4
    write(tmp_path / "in" / "a.nii", head(), spacing=(1.0, 1.0, 2.0))
    write(tmp_path / "in" / "a_gt.nii", labels, spacing=(1.0, 1.0, 2.0))
    assert import_data("nifti", tmp_path / "in", tmp_path / "all").images == 4
    few = import_data("nifti", tmp_path / "in", tmp_path / "few", options=Options(drop_empty=True))
    assert sorted(scan(few.folder).images) == ["p0001_s01_i003", "p0001_s01_i004"]
    assert few.classes == 2  # the values 2 and 4 are classes 1 and 2
    assert pixels(few.folder, "p0001_s01_i004", "masks").max() == 2


@pytest.mark.parametrize(
    ("image", "label", "pattern"),
    [
        ("a.nii.gz", "a_label.nii.gz", None),
        ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", None),
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", None),
        ("x/scan.nii", "x/labels/scan.nii.gz", None),
        ("x/scan.nii", "truth/of_scan.nii", "../truth/of_{}"),
    ],
)
def test_labels_are_found(tmp_path: Path, image: str, label: str, pattern: str | None) -> None:
    write(tmp_path / "in" / image, head())
    write(tmp_path / "in" / label, (head() > 50).astype(np.uint8))
    options = Options(labels=pattern)
    result = import_data("nifti", tmp_path / "in", tmp_path / "out", options=options)
    assert result.images == result.masks > 0


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("a_gt.nii", np.zeros((4, 5, 7), np.uint8), "resample the labels to the image"),
        ("a_gt.nii", np.full((4, 5, 6), 0.5, np.float32), "expected labels 0, 1, 2"),
        ("b.nii", np.zeros((4, 5, 6, 3), np.uint8), "3 values a voxel, expected 3 and 1"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, name: str, values: Array, expected: str
) -> None:
    write(tmp_path / "in" / "a.nii", head(), spacing=(1.0, 1.0, 1.0))
    write(tmp_path / "in" / name, values, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=rf"{name}: .*{expected}"):
        import_data("nifti", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_a_volume_that_was_cut_off_is_damaged_and_not_filled_with_zeros(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "in" / name, head())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"{name}: damaged.+; get it again"):
        import_data("nifti", tmp_path / "in", tmp_path / "out")
    path.write_bytes(b"no volume")
    with pytest.raises(DataError, match=rf"{name}: not a NIfTI volume") as error:
        import_data("nifti", tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_two_labels_of_one_image_are_both_named(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a_gt.nii.gz", "a_seg.nii.gz"):
        write(tmp_path / "in" / name, head())
    with pytest.raises(DataError, match=r"two labels, in/a_gt\.nii\.gz and in/a_seg\.nii\.gz"):
        import_data("nifti", tmp_path / "in", tmp_path / "out")


def test_labels_without_an_image_are_not_taken_for_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in" / "a.nii", head())
    write(tmp_path / "in" / "b_seg.nii", head())
    result = import_data("nifti", tmp_path / "in", tmp_path / "out")
    assert result.left_out == {"label volumes without an image": 1}
    assert caplog.messages == [
        "nifti: 1 label volumes without an image are left out, e.g. in/b_seg.nii"
    ]


def test_subjects_of_bids_keep_their_sessions_together(tmp_path: Path) -> None:
    for name in ("sub-02_ses-1", "sub-01_ses-1", "sub-01_ses-2"):
        write(tmp_path / "in" / "flat" / f"{name}.nii", head())
    result = import_data("nifti", tmp_path / "in", tmp_path / "out")
    groups = {files.group for files in scan(result.folder).images.values()}
    assert groups == {"nifti/p0001", "nifti/p0002"}


@pytest.mark.parametrize("text", ["40", "40,0", "a,b", "1,2,3", "nan,3", "3,inf"])
def test_a_window_is_two_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--window {text}: expected CENTER,WIDTH"):
        parse_window(text)
    assert parse_window("40,400") == (40, 400)


def test_a_pattern_of_labels_has_one_place_for_the_name(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii", head())
    with pytest.raises(ConfigError, match=r"--labels seg: expected one \{\}"):
        import_data("nifti", tmp_path / "in", tmp_path / "out", options=Options(labels="seg"))
    with pytest.raises(ConfigError, match="--axis up: expected axial, coronal, sagittal"):
        import_data("nifti", tmp_path / "in", tmp_path / "out", options=Options(axis="up"))
