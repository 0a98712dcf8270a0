"""DICOM series become images with their masks, and nothing that tells whose they are."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from pipeline.data.folder import scan
from pipeline.data.importers.importing import import_data
from pipeline.data.importers.items import Options
from pipeline.data.importers.sources import recognise
from pipeline.errors import DataError

Array = NDArray[Any]

SECRETS = {
    "PatientName": "DOE^JANE",
    "PatientID": "MRN-778899",
    "PatientBirthDate": "19561123",
    "PatientAddress": "12 Elm Street",
    "ReferringPhysicianName": "HOUSE^GREGORY",
    "InstitutionName": "Saint Elsewhere",
    "AccessionNumber": "ACC4711",
    "StudyDate": "20210304",
    "StudyDescription": "knee of Jane",
    "DeviceSerialNumber": "SN-0815",
}
PREFIX = "1.2.826.0.1.3680043.10.99."


def uid(*numbers: int) -> UID:
    return UID(PREFIX + ".".join(map(str, numbers)))


def dataset(values: Array, series: int = 1, number: int = 1, **tags: Any) -> FileDataset:
    """Return an image of one frame, or of several (N, H, W), grey or RGB, of Jane Doe."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = uid(series, number)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, uid(series, number)
    data.StudyInstanceUID, data.SeriesInstanceUID = uid(900), uid(series)
    data.InstanceNumber = number
    colour = values.shape[-1] == 3
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    size = values.shape[: values.ndim - colour]
    data.Rows, data.Columns = size[-2:]
    if len(size) == 3:
        data.NumberOfFrames = size[0]
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for key, value in (SECRETS | tags).items():
        setattr(data, key, value)
    return data


def save(path: Path, data: FileDataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path)
    return path


def ramp(offset: int = 0) -> Array:
    """Values (6, 8) from ``offset`` in steps of 1."""
    return (np.arange(48) + offset).astype(np.uint16).reshape(6, 8)


def pixels(folder: Path, image_id: str, kind: str = "images") -> Array:
    return np.asarray(Image.open(folder / kind / f"{image_id}.png"))


def grey(values: Array, low: float, high: float) -> Array:
    scaled = (values.astype(float) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def slice_at(z: float, **tags: Any) -> dict[str, Any]:
    place = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    return place | {"PixelSpacing": [0.5, 0.75]} | tags


def test_a_series_is_sorted_by_position_and_rescaled(tmp_path: Path) -> None:
    for number, z in ((1, 9.0), (2, 3.0), (3, 6.0)):  # neither names nor numbers are in order
        tags = slice_at(z, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=0, WindowWidth=100)
        data = dataset(ramp(int(z)), number=number, **tags)
        save(tmp_path / "in" / f"IM{number}.dcm", data)
    assert recognise(tmp_path / "in") == "dicom"
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    found = scan(result.folder).images
    assert list(found) == ["p0001_s01_i001", "p0001_s01_i002", "p0001_s01_i003"]
    assert {files.group for files in found.values()} == {"dicom/p0001"}
    for image_id, z in zip(found, (3, 6, 9), strict=True):
        expected = grey(ramp(z).astype(float) * 2 - 100, -50, 50)
        np.testing.assert_array_equal(pixels(result.folder, image_id), expected)
    with (result.folder / "spacing.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["p0001_s01_i001", "0.5", "0.75", "3"]


def test_monochrome1_is_inverted_and_its_window_is_that_of_the_stored_values(
    tmp_path: Path,
) -> None:
    tags = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 2, "RescaleIntercept": 5}
    save(tmp_path / "in" / "a.dcm", dataset(ramp(), BitsStored=12, HighBit=11, **tags))
    options = Options(window=(50, 60))
    result = import_data("dicom", tmp_path / "in", tmp_path / "out", options=options)
    values = ramp().astype(float) * 2 + 5
    expected = 255 - grey(values, 20, 80).astype(int)
    assert np.abs(pixels(result.folder, "p0001_s01_i001") - expected).max() <= 1  # of rounding


def test_without_a_window_the_percentiles_are_those_of_the_series(tmp_path: Path) -> None:
    for number, offset in ((1, 0), (2, 1000)):
        save(tmp_path / "in" / f"{number}.dcm", dataset(ramp(offset), number=number))
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    dark, bright = (pixels(result.folder, f"p0001_s01_i00{n}") for n in (1, 2))
    assert dark.max() < 15
    assert bright.min() > 240
    assert not (result.folder / "spacing.csv").exists()


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colour_and_several_frames(tmp_path: Path, photometric: str) -> None:
    values = np.zeros((2, 6, 8, 3), np.uint8)
    values[0], values[1] = (200, 100, 50), (20, 128, 128)
    data = dataset(values, PhotometricInterpretation=photometric)
    save(tmp_path / "in" / "cine.dcm", data)
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    expected = {"RGB": (200, 100, 50), "YBR_FULL": (91, 255, 150)}[photometric]
    assert result.images == 2
    assert tuple(pixels(result.folder, "p0001_s01_i001")[0, 0]) == expected
    if photometric == "YBR_FULL":
        assert tuple(pixels(result.folder, "p0001_s01_i002")[0, 0]) == (20, 20, 20)


def test_compressed_pixels_are_the_same(tmp_path: Path) -> None:
    data = dataset(ramp())
    save(tmp_path / "a" / "1.dcm", data)
    data.compress(RLELossless, generate_instance_uid=False)
    save(tmp_path / "b" / "1.dcm", data)
    found = [
        import_data("dicom", tmp_path / name, tmp_path / f"{name}_out").folder for name in "ab"
    ]
    first, second = (pixels(folder, "p0001_s01_i001") for folder in found)
    np.testing.assert_array_equal(first, second)


def test_pixels_that_pydicom_alone_cannot_decode_are_read(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    (tmp_path / "in").mkdir()
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "in" / "1.dcm"))
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG2000")
    writer.Execute(sitk.GetImageFromArray(ramp()[None]))
    syntax = dcmread(tmp_path / "in" / "1.dcm", stop_before_pixels=True).file_meta
    assert syntax.TransferSyntaxUID == JPEG2000Lossless
    options = Options(window=(25, 50))
    result = import_data("dicom", tmp_path / "in", tmp_path / "out", options=options)
    np.testing.assert_array_equal(pixels(result.folder, "p0001_s01_i001"), grey(ramp(), 0, 50))


def test_patients_and_series_are_numbered_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name, patient, series in (
        ("a/1", "Z9", 5), ("b/1", "A1", 3), ("c/1", "Z9", 4), ("d/1", "", 7), ("d/2", "", 8),
    ):  # fmt: skip
        data = dataset(ramp(), series, PatientID=patient)
        save(tmp_path / "in" / name, data)  # without an ending, as on a CD
    found = scan(import_data("dicom", tmp_path / "in", tmp_path / "out").folder).images
    assert list(found) == [
        "p0001_s01_i001", "p0001_s02_i001", "p0002_s01_i001", "p0003_s01_i001", "p0003_s02_i001",
    ]  # fmt: skip


# --------------------------------------------------------------------------- masks


def segmentation(frames: list[tuple[int, int, int, Array]]) -> FileDataset:
    """Return a DICOM-SEG of frames: series, instance, segment and mask (H, W) of each."""
    masks = np.stack([mask for *_, mask in frames]).astype(np.uint8)
    data = dataset(masks, series=77)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.66.4")
    data.Modality, data.SegmentationType = "SEG", "BINARY"
    data.BitsAllocated = data.BitsStored = 1
    data.HighBit = 0
    packed = np.packbits(masks.ravel(), bitorder="little").tobytes()
    data.PixelData = packed + b"\0" * (len(packed) % 2)
    groups = []
    for series, instance, segment, _ in frames:
        source, derivation, number, group = Dataset(), Dataset(), Dataset(), Dataset()
        source.ReferencedSOPInstanceUID = uid(series, instance)
        derivation.SourceImageSequence = Sequence([source])
        number.ReferencedSegmentNumber = segment
        group.DerivationImageSequence = Sequence([derivation])
        group.SegmentIdentificationSequence = Sequence([number])
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return data


def test_segmentations_give_masks_to_the_images_that_they_name(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path / "in" / f"{number}.dcm", dataset(ramp(), number=number, **slice_at(number)))
    save(tmp_path / "in" / "other.dcm", dataset(ramp(), series=2))
    low, high = ramp() < 10, ramp() > 40
    save(
        tmp_path / "in" / "seg.dcm",
        segmentation([(1, 1, 2, low), (1, 1, 5, high), (1, 3, 5, high)]),
    )
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    assert (result.images, result.masks, result.classes) == (4, 3, 2)
    for number, expected in ((1, low + 2 * high), (2, 0 * high), (3, 2 * high)):
        mask = pixels(result.folder, f"p0001_s01_i00{number}", "masks")
        np.testing.assert_array_equal(mask, expected)
    few = import_data("dicom", tmp_path / "in", tmp_path / "few", options=Options(drop_empty=True))
    assert few.images == 3


def test_masks_beside_single_frames_lose_their_texts_alone(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.dcm", dataset(ramp()))
    mask = np.where(ramp() > 20, 255, 0).astype(np.uint8)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", "DOE^JANE")
    Image.fromarray(mask).save(tmp_path / "in" / "a_mask.png", pnginfo=texts)
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    assert (result.masks, result.left_out) == (1, {})
    path = result.folder / "masks" / "p0001_s01_i001.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), mask)
    assert b"DOE" not in path.read_bytes()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("two masks", "dicom: an image has two masks; say which with --labels"),
        ("no picture", "file 1 of 2, .+, has a mask beside it that cannot be read"),
        ("another size", "file 1 of 2, .+ its segmentation .+; resample it"),
        ("deep colours", "file 1 of 1, .+, has colours of more than 8 bits"),
    ],
)
def test_what_cannot_be_used_is_named_by_number(tmp_path: Path, fault: str, expected: str) -> None:
    colours = np.zeros((6, 8, 3), np.uint16)
    image = dataset(colours if fault == "deep colours" else ramp())
    save(tmp_path / "in" / "a.dcm", image)
    if fault == "two masks":
        for name in ("a_mask.png", "a_seg.png"):
            Image.fromarray(ramp().astype(np.uint8)).save(tmp_path / "in" / name)
    elif fault == "no picture":
        (tmp_path / "in" / "a_mask.png").write_bytes(b"no picture")
    elif fault == "another size":
        segment = segmentation([(1, 1, 1, np.ones((4, 4), bool))])
        save(tmp_path / "in" / "seg.dcm", segment)
    with pytest.raises(DataError, match=expected):
        import_data("dicom", tmp_path / "in", tmp_path / "out")


# --------------------------------------------------------------------------- whose they are


def hospital(folder: Path) -> Path:
    """Write what a hospital has: names in paths, a report, an odd date, burned-in text."""
    top = folder / "in"
    for number in (1, 2):
        data = dataset(ramp(), number=number, **slice_at(number), ImageComments="call Jane Doe")
        save(top / "DOE_JANE_MRN-778899" / f"{number}.dcm", data)
    report = dataset(ramp(), series=5)
    report.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")
    del report.Rows, report.Columns, report.PixelData
    save(top / "DOE_JANE_MRN-778899" / "report.dcm", report)
    burned = dataset(ramp(), series=6, BurnedInAnnotation="YES")
    save(top / "DOE_JANE_MRN-778899" / "us.dcm", burned)
    save(top / "DOE_JANE_MRN-778899" / "seg.dcm", segmentation([(1, 1, 1, ramp() > 20)]))
    (top / "DOE_JANE_MRN-778899" / "Saint Elsewhere.pdf").write_bytes(b"x")
    return top


def identifying(text: bytes) -> list[str]:
    values = [*SECRETS.values(), "DOE_JANE", "Doe", "Jane", PREFIX]
    return [value for value in values if value.encode() in text]


def test_nothing_that_identifies_reaches_files_ids_or_messages(tmp_path: Path) -> None:
    source, out = hospital(tmp_path), tmp_path / "out"
    result = call("import", "dicom", source, out)
    assert result.exit_code == 0, result.output
    assert "2 images, 2 masks, 1 groups" in result.stdout
    assert result.stderr.splitlines() == [
        "WARNING: dicom: 1 images with text burned into their pixels (BurnedInAnnotation) are "
        "left out",
        "WARNING: dicom: 1 DICOM files without an image (reports, contours, directories) are left "
        "out",
        "WARNING: dicom: 1 files that are neither DICOM nor a mask beside an image are left out",
    ]
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) == 2 + 2 + 3
    everything = b"\n".join(path.read_bytes() + os.fsencode(path) for path in written)
    printed = (result.stdout + result.stderr).encode()
    assert identifying(everything + printed) == []
    assert (
        identifying(call("import", "dicom", source, tmp_path / "b", "--json").output.encode()) == []
    )


@pytest.mark.parametrize("fault", ["pixels", "segmentation", "unreadable", "cut"])
def test_no_error_names_a_patient_either(tmp_path: Path, fault: str) -> None:
    source = hospital(tmp_path)
    path = source / "DOE_JANE_MRN-778899" / ("seg.dcm" if fault == "segmentation" else "2.dcm")
    content = path.read_bytes()
    if fault == "unreadable":
        path.unlink()
        path.symlink_to(path)
    else:
        path.write_bytes(content[: content.index(b"DOE^JANE") + 4 if fault == "cut" else -60])
    result = call("import", "dicom", source, tmp_path / "out")
    assert result.exit_code == 3
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: dicom: file ")
    assert " of 6, in the order of their paths, " in line
    assert identifying(result.stderr.encode()) == []
    assert not (tmp_path / "out").exists()


def test_values_that_pydicom_would_quote_are_not_shown(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "in" / "1.dcm", dataset(ramp(), **slice_at(1)))
    content = path.read_bytes()
    for value, odd in (
        (b"0.5\\0.75", b"DOE\\JANE"),
        (b"19561123", b"DOE JANE"),
    ):
        assert value in content
        content = content.replace(value, odd)
    path.write_bytes(content)
    result = import_data("dicom", tmp_path / "in", tmp_path / "out")
    assert result.images == 1
    assert not (result.folder / "spacing.csv").exists()
    assert caplog.messages == []
    assert list(recwarn) == []


@pytest.mark.parametrize("content", [b"damaged", None])
def test_an_archive_of_a_patient_is_not_named(tmp_path: Path, content: bytes | None) -> None:
    source = hospital(tmp_path)
    archive = source / "DOE_JANE_MRN-778899.zip"  # beside the folder, it counts as unpacked
    if content is not None:
        archive = source / "DOE JANE.zip"
    archive.write_bytes(content or b"")
    result = call("import", "dicom", source, tmp_path / "out")
    assert result.exit_code == (0 if content is None else 3)
    assert identifying(result.output.encode()) == []


def test_a_folder_without_dicom_says_what_it_looks_like(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="no DICOM images among its 1 files; this looks like nifti"):
        import_data("dicom", tmp_path / "in", tmp_path / "out")
