"""Every public data set of the table becomes an input folder that ``prepare`` can scan."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import answer, call, digest, fails
from originals import HEIGHT, ORIGINALS, WIDTH, lay_out, mask, picture

from pipeline.data.folder import scan
from pipeline.data.images import read_image
from pipeline.data.importers.importing import import_data
from pipeline.data.importers.sources import recognise
from pipeline.data.importers.table import KINDS, clinicdb_sequence
from pipeline.data.masks import read_mask
from pipeline.errors import ConfigError, DataError

EVERY = sorted(KINDS)
ROOT = Path(__file__).parents[3]


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_has_an_original() -> None:
    assert sorted(ORIGINALS) == EVERY


@pytest.mark.parametrize("kind", EVERY)
def test_images_masks_sites_and_groups_arrive(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, source = ORIGINALS[kind], lay_out(kind, tmp_path / "in")
    before = digest(source)
    result = import_data(kind, source, tmp_path / "out")
    assert digest(source) == before
    assert caplog.messages == []
    rows = {
        row["image_id"]: (row["site"], row.get("group", ""))
        for row in table_of(result.folder / "sites.csv")
    }
    assert rows == original.rows
    found = scan(result.folder).images
    assert found.keys() == original.rows.keys()
    partly = len({bool(group) for _, group in original.rows.values()}) > 1
    assert bool(caplog.messages) == partly  # without any groups there is no warning of them
    assert result.images == result.masks == len(found)
    for image_id, files in found.items():
        assert files.site == original.rows[image_id][0]
        size = read_image(result.folder / files.image).pixels.shape[:2]
        assert size == (HEIGHT, WIDTH)
        assert files.mask is not None
        path = result.folder / files.mask
        pixels = read_mask(path, size_hw=size, num_classes=result.classes).pixels
        assert (pixels > 0).sum() == HEIGHT * original.foreground.get(image_id, 8)


@pytest.mark.parametrize("kind", EVERY)
def test_a_data_set_is_recognised_and_no_other_kind_takes_it(kind: str, tmp_path: Path) -> None:
    source = lay_out(kind, tmp_path / "in")
    assert recognise(source) == kind
    assert recognise(tmp_path / "in") == kind
    for other in EVERY:
        if other != kind:
            with pytest.raises(DataError, match=rf": not {other}; this looks like {kind}:"):
                import_data(other, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", EVERY)
def test_an_archive_gives_the_same_bytes_as_its_folder(kind: str, tmp_path: Path) -> None:
    source = lay_out(kind, tmp_path / "in")
    archive = shutil.make_archive(str(tmp_path / source.name), "zip", tmp_path / "in")
    import_data(kind, source, tmp_path / "a")
    import_data(kind, Path(archive), tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    card = (tmp_path / "a" / "SOURCE.md").read_text()
    assert f"| licence | {KINDS[kind].licence} |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("kind", EVERY)
def test_the_docs_have_a_row_and_a_command_for_each_kind(kind: str) -> None:
    page, entry = (ROOT / "docs" / "public.md").read_text().splitlines(), KINDS[kind]
    assert f"| `{kind}` | {entry.title} | {entry.licence} | {entry.address} |" in page
    assert f"    samfed import {kind} downloads/{kind} data/{kind}" in page


def test_bytes_are_copied_as_they_are(tmp_path: Path) -> None:
    source = lay_out("kvasir-seg", tmp_path)
    import_data("kvasir-seg", source, tmp_path / "out")
    for folder in ("images", "masks"):
        (file,) = (source / folder).iterdir()
        assert (tmp_path / "out" / folder / file.name).read_bytes() == file.read_bytes()


def test_a_folder_of_archives_is_taken_as_it_was_downloaded(tmp_path: Path) -> None:
    source = lay_out("isic2018", tmp_path / "in")
    for folder in list(source.iterdir()):
        shutil.make_archive(str(source / folder.name), "zip", source, folder.name)
        shutil.rmtree(folder)
    assert sorted(path.suffix for path in source.iterdir()) == [".zip", ".zip"]
    assert import_data("isic2018", source, tmp_path / "a").masks == 2
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as both:  # as a repository gives them
        for path in source.iterdir():
            both.write(path, path.name)
    import_data("isic2018", tmp_path / "both.zip", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_an_archive_beside_its_folder_is_not_unpacked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = lay_out("etis", tmp_path / "in")
    shutil.make_archive(str(tmp_path / "in" / source.name), "zip", tmp_path / "in", source.name)
    assert import_data("etis", tmp_path / "in", tmp_path / "out").images == 1
    assert caplog.messages == ["1 archives are not unpacked: a folder of the name lies beside each"]


def test_what_is_left_out_is_said_in_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = lay_out("busi", tmp_path)
    picture(source / "benign" / "benign (2).png")
    mask(source / "benign" / "benign (3)_mask.png")
    picture(source / "benign" / "scan.png")
    picture(source / ".hidden.png")
    result = import_data("busi", source, tmp_path / "out")
    top = "Dataset_BUSI_with_GT/benign"
    assert caplog.messages == [
        f"busi: 1 images have no mask, e.g. {top}/benign (2).png",
        f"busi: 1 masks without an image are left out, e.g. {top}/benign (3)_mask.png",
        f"busi: 1 files that are not the data set's are left out, e.g. {top}/scan.png",
    ]
    assert (result.images, result.masks) == (3, 2)
    assert scan(result.folder).images["benign_2"].mask is None


def test_one_lung_of_two_is_no_mask(tmp_path: Path) -> None:
    source = lay_out("montgomery", tmp_path)
    (source / "ManualMask/leftMask/MCUCXR_0001_0.png").unlink()
    assert import_data("montgomery", source, tmp_path / "out").masks == 0


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    source = lay_out("etis", tmp_path / "in")
    linked = tmp_path / "linked" / "ETIS-LaribPolypDB"
    linked.mkdir(parents=True)
    for name in ("ETIS-LaribPolypDB", "Ground Truth"):
        (linked / name).symlink_to(source / name)
    (linked / "above").symlink_to(tmp_path / "linked")
    assert import_data("etis", linked, tmp_path / "out").masks == 1


@pytest.mark.parametrize(("kind", "library"), [("acdc", "SimpleITK"), ("dicom", "pydicom")])
def test_a_library_that_is_not_there_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    source = lay_out("acdc", tmp_path / "in")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"needs SimpleITK and pydicom; pip install 'samfed"):
        import_data(kind, source, tmp_path / "out")


def test_an_image_with_a_mask_too_many_is_refused(tmp_path: Path) -> None:
    source = lay_out("isic2018", tmp_path / "in")
    (source / "copy").mkdir()
    mask(source / "copy" / "ISIC_0000001_segmentation.png")
    with pytest.raises(DataError, match=r"ISIC_0000001\.jpg: has 2 masks, e\.g\. .+, expected 1"):
        import_data("isic2018", source, tmp_path / "out")


def test_two_images_with_one_id_are_both_named(tmp_path: Path) -> None:
    source = lay_out("etis", tmp_path)
    (source / "images").mkdir()
    picture(source / "images" / "1.png")
    with pytest.raises(DataError, match=r"1\.tif and .+/images/1\.png: two images with id '1'"):
        import_data("etis", source, tmp_path / "out")


def test_a_frame_that_clinicdb_has_not_is_refused(tmp_path: Path) -> None:
    source = lay_out("cvc-clinicdb", tmp_path)
    picture(source / "Original" / "613.tif")
    with pytest.raises(DataError, match=r"613\.tif: CVC-ClinicDB has frames 1\.\.612, not 613"):
        import_data("cvc-clinicdb", source, tmp_path / "out")


def test_clinicdb_has_29_sequences() -> None:
    lengths = np.bincount([clinicdb_sequence(frame) for frame in range(1, 613)])[1:]
    assert len(lengths) == 29
    assert lengths.tolist()[:10] == [25, 25, 17, 11, 25, 23, 25, 26, 22, 6]
    assert lengths.tolist()[-1] == 21


def test_a_damaged_table_of_ham10000_is_one_line(tmp_path: Path) -> None:
    source = lay_out("ham10000", tmp_path)
    (source / "HAM10000_metadata").write_text("a,b\n1,2\n")
    with pytest.raises(
        DataError, match=r"damaged table .+ expected columns image_id and lesion_id"
    ):
        import_data("ham10000", source, tmp_path / "out")


def test_nothing_is_written_over_or_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = lay_out("isic2018", tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(DataError, match="is there and not empty"):
        import_data("isic2018", source, out)
    (out / "mine").unlink()
    with pytest.raises(ConfigError, match="which is only ever read"):
        import_data("isic2018", source, source / "out")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_data("isic2018", source, out, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert list(out.iterdir()) == []


def test_what_cannot_be_read_is_an_os_error(tmp_path: Path) -> None:
    source = lay_out("etis", tmp_path)
    image = source / "ETIS-LaribPolypDB" / "1.tif"
    image.unlink()
    image.symlink_to(tmp_path / "gone.tif")
    with pytest.raises(FileNotFoundError):
        import_data("etis", source, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out")


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    source = lay_out("isic2018", tmp_path / "in")
    assert "next: samfed init '" in call("import", "isic2018", source, tmp_path / "a b").stdout
    found = answer("import", "isic2018", source, tmp_path / "out")
    assert found["images"] == 2
    assert found["sites"] == {"isic2018": 2}
    line = fails(2, "import", "isic2020", source, tmp_path / "b")
    assert line.startswith("import isic2020: no such kind (did you mean isic2017?)") or (
        "did you mean isic2018?" in line
    )
    assert "leave it out" in fails(2, "import", "etis", source, tmp_path / "b", "--labels", "{}")
    assert "expected it as it is published" in fails(
        3, "import", "isic2018", lay_out_empty(tmp_path), tmp_path / "b"
    )


def lay_out_empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.bin").write_bytes(b"x")
    return tmp_path / "empty"
