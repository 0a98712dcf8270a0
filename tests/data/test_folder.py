"""Which file is which image's, and one clear line for every folder or table that is not clear."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import RGB, save

from pipeline.data.folder import MASK_SUFFIXES, scan, suggest_mask_pattern
from pipeline.data.sites import NO_GROUP, read_sites
from pipeline.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images, the first with a mask."""
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", RGB)
    save(tmp_path / "masks" / "a.png", np.eye(6, 4, dtype=np.uint8))
    return tmp_path


# --------------------------------------------------------------------------- the folder


def scan_refusal(root: Path, file: str) -> str:
    with pytest.raises(DataError) as caught:
        scan(root)
    text = str(caught.value)
    assert text.startswith(str(root / file))
    assert "\n" not in text
    return text.removeprefix(str(root / file))


def test_scan(root: Path) -> None:
    (root / "images" / "notes.txt").write_text("not an image")
    (root / "images" / ".hidden.png").write_text("left by an editor")
    found = scan(root).images
    assert list(found) == ["a", "b"]
    assert (found["a"].image, found["a"].mask) == ("images/a.png", "masks/a.png")
    assert (found["b"].mask, found["b"].site, found["b"].group) == (None, "site", "b")


def test_no_images_folder(tmp_path: Path) -> None:
    assert scan_refusal(tmp_path, "images") == (
        ": no such folder; expected images/<id>.png|jpg|tif|bmp in data.root"
    )


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert scan_refusal(tmp_path, "images") == (
        ": no images found; expected .png .jpg .jpeg .tif .tiff .bmp files"
    )


def test_two_images_with_one_id(root: Path) -> None:
    save(root / "images" / "a.jpg", RGB)
    assert scan_refusal(root, "images/a.png") == (
        ": a second image with id 'a' beside a.jpg; rename or remove one"
    )


def test_a_file_name_that_is_no_text(root: Path) -> None:
    name = b"\xff.png"
    try:
        Path(str(root / "images").encode().decode(), name.decode(errors="surrogateescape")).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(DataError, match=r"file name is not valid UTF-8; rename it$"):
        scan(root)


def test_two_masks_with_one_id(root: Path) -> None:
    save(root / "masks" / "a.PNG", np.zeros((6, 4), np.uint8))
    if len(list((root / "masks").iterdir())) == 1:
        pytest.skip("this file system does not tell a.png from a.PNG")
    assert "a second mask with id 'a'" in scan_refusal(root, "masks/a.png")


def test_mask_without_image(root: Path) -> None:
    save(root / "masks" / "c.png", np.zeros((6, 4), np.uint8))
    assert scan_refusal(root, "masks/c.png") == ": mask without an image; expected images/c.*"
    save(root / "masks" / "d.png", np.zeros((6, 4), np.uint8))
    assert scan_refusal(root, "masks/c.png") == (
        ": mask without an image; expected images/c.* (2 masks lack one)"
    )


def test_what_nothing_reads_is_counted_and_named(root: Path) -> None:
    (root / "images" / "notes.txt").write_text("not an image")
    (root / "images" / "more").mkdir()
    for name in ("b.txt", "c.pdf", "d.doc", "e.xls"):
        (root / "masks" / name).write_text("not a mask")
    write_sites(root, "image_id,site\na,north\nb,south\nc,south\n")
    found = scan(root)
    assert found.as_json() == {
        "images": 2,
        "masks": 1,
        "groups": 2,
        "ignored_files": 5,
        "ignored_subfolders": 1,
        "rows_without_image": 1,
    }
    assert found.text() == (
        "2 images, 1 masks, 2 groups; ignored: 5 files (images/notes.txt, masks/b.txt, "
        "masks/c.pdf, ...), 1 subfolders (images/more), 1 rows of sites.csv without an image (c)"
    )


def test_images_in_subfolders_alone(tmp_path: Path) -> None:
    save(tmp_path / "images" / "train" / "a.png", RGB)
    assert scan_refusal(tmp_path, "images") == (
        ": no images found; expected .png .jpg .jpeg .tif .tiff .bmp files; its 1 subfolders are "
        "not read"
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_composed_however_they_are_stored(root: Path, form: str) -> None:
    name = unicodedata.normalize(form, "K\u00f6rper")  # type: ignore[arg-type]
    save(root / "images" / f"{name}.png", RGB)
    save(root / "masks" / f"{name}.png", RGB[:, :, 0])
    write_sites(root, "image_id,site\na,x\nb,x\nK\u00f6rper,x\n")
    found = scan(root).images["K\u00f6rper"]
    assert (found.image, found.mask) == (f"images/{name}.png", f"masks/{name}.png")
    assert (root / found.image).is_file()


# --------------------------------------------------------------------------- names of masks


def name_masks(root: Path, *names: str) -> None:
    """Give the two images these masks alone."""
    (root / "masks" / "a.png").unlink()
    for name in names:
        (root / "masks" / name).touch()


@pytest.mark.parametrize("suffix", [*MASK_SUFFIXES, ".JPG", ".GIF"])
def test_a_mask_has_any_image_ending(root: Path, suffix: str) -> None:
    name_masks(root, f"b{suffix}")
    assert scan(root).images["b"].mask == f"masks/b{suffix}"


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("a.png", "b.jpg"), "{id}.*"),
        (("a.png",), "{id}.*"),
        (("a.png", "a.jpg"), "{id}.png"),
        (("a_segmentation.png", "b_segmentation.png"), "{id}_segmentation.png"),
        (("a_mask.png", "b_mask.tif"), "{id}_mask.*"),
        (("mask_a.png", "mask_b.png", "notes.txt"), "mask_{id}.png"),
        (("seg of b v2.bmp",), "seg of {id} v2.bmp"),
    ],
)
def test_the_pattern_of_masks_is_found(root: Path, names: tuple[str, ...], pattern: str) -> None:
    name_masks(root, *names)
    if names == ("a.png", "a.jpg"):
        (root / "masks" / "b.png").touch()
    assert suggest_mask_pattern(root) == pattern
    masks = [files.mask for files in scan(root, mask_pattern=pattern).images.values()]
    assert len([mask for mask in masks if mask]) == min(len(names), 2)


def test_no_pattern_is_found_where_no_mask_belongs_to_an_image(root: Path) -> None:
    name_masks(root, "x.png", "y.png", "a.txt")
    assert suggest_mask_pattern(root) is None


def test_numbers_do_not_confuse_the_pattern(tmp_path: Path) -> None:
    for number in range(1, 30):
        save(tmp_path / "images" / f"{number}.png", RGB)
        save(tmp_path / "masks" / f"{number}_1.png", RGB[:, :, 0])
    assert suggest_mask_pattern(tmp_path) == "{id}_1.png"
    found = scan(tmp_path, mask_pattern="{id}_1.png").images
    assert {i: files.mask for i, files in found.items()} == {i: f"masks/{i}_1.png" for i in found}


def test_another_pattern_that_fits_is_named(root: Path) -> None:
    name_masks(root, "a_mask.png", "b_mask.png")
    fault = ": of 2 masks 0 belong to an image under data.mask_pattern"
    would = "'{id}_mask.png' would match 2; set it"
    assert scan_refusal(root, "masks") == f"{fault} '{{id}}.*'; {would}"
    with pytest.raises(DataError) as caught:
        scan(root, mask_pattern="mask_{id}.*")
    assert str(caught.value) == f"{root}/masks{fault} 'mask_{{id}}.*'; {would}"


def test_a_pattern_that_fits_few_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    name_masks(root, "a_mask.png", "a.png", "b.png")
    found = scan(root, mask_pattern="{id}_mask.png")
    assert found.images["a"].mask == "masks/a_mask.png"
    assert found.ignored == ("masks/a.png", "masks/b.png")
    assert caplog.messages == [
        f"{root}/masks: of 3 masks 1 belong to an image under data.mask_pattern "
        "'{id}_mask.png'; '{id}.*' would match 2"
    ]


def test_a_pattern_that_fits_nothing(root: Path) -> None:
    name_masks(root, "x.png", "y.png")
    with pytest.raises(DataError) as caught:
        scan(root, mask_pattern="{id}_mask.*")
    assert str(caught.value) == (
        f"{root}/masks: none of 2 masks, e.g. x.png, is named by data.mask_pattern "
        "'{id}_mask.*'; change it, or move them away"
    )


def test_two_masks_of_one_image_are_told_apart_by_a_pattern(root: Path) -> None:
    save(root / "masks" / "a.jpg", RGB)
    assert scan_refusal(root, "masks/a.png") == (
        ": a second mask with id 'a' beside a.jpg; rename or remove one, or set "
        "data.mask_pattern: '{id}.png'"
    )
    assert scan(root, mask_pattern="{id}.png").images["a"].mask == "masks/a.png"


@pytest.mark.parametrize("name", ["a_mask", "a_segmentation", "mask_a"])
def test_masks_among_the_images_are_refused(root: Path, name: str) -> None:
    save(root / "images" / f"{name}.png", RGB)
    pattern = name.replace("_a", "_{id}") if name == "mask_a" else name.replace("a_", "{id}_", 1)
    assert scan_refusal(root, f"images/{name}.png") == (
        f": looks like the mask of a.png; move masks to {root}/masks and set data.mask_pattern: "
        f"'{pattern}.*', or rename it"
    )


@pytest.mark.parametrize(
    "pattern",
    ["masks", "{id}", "{id}_mask", "../{id}.png", "{id}/mask.png", "{id}{id}.png", "*.png"],
)
def test_a_pattern_that_names_no_file_is_refused(root: Path, pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(root, root / "cache", data={"mask_pattern": pattern})
    assert str(caught.value) == (
        f"test: data.mask_pattern: found '{pattern}', expected a file name with {{id}} and an "
        "image ending, e.g. {id}_mask.png or {id}.*"
    )


# --------------------------------------------------------------------------- sites.csv


def write_sites(root: Path, text: str, encoding: str = "utf-8") -> None:
    (root / "sites.csv").write_bytes(text.encode(encoding))


def test_sites(root: Path) -> None:
    write_sites(root, "image_id,site,group\na,north,p1\nb,south,p1\n")
    found = scan(root).images
    assert (found["a"].site, found["a"].group) == ("north", "north/p1")
    assert (found["b"].site, found["b"].group) == ("south", "south/p1")  # another p1


def test_sites_with_a_byte_order_mark_and_no_groups(root: Path) -> None:
    write_sites(root, "image_id,site\r\na,north\r\nb,north\r\n", "utf-8-sig")
    assert [record.group for record in scan(root).images.values()] == ["north/a", "north/b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "image_id,hospital\na,x\nb,x\n",
            ": found columns ['image_id', 'hospital']; expected image_id, site and optionally "
            "group",
        ),
        ("", ": found columns []; expected image_id, site and optionally group"),
        ("image_id,site\na,x\n", ": no row for image 'b' (1 of 2 images lack one)"),
        ("image_id,site\na,x\nb,x\na,y\n", " line 4: 'a' is listed twice"),
        ("image_id,site\na,x\nb,\n", " line 3: empty image_id or site"),
        ("image_id,site\na,x\nb\n", " line 3: empty image_id or site"),
        ("image_id,site\na,x\na.png,y\n", " line 3: 'a' is listed twice"),
        ("image_id,site, Site\na,x,y\n", ": found column site twice; remove one"),
        (
            "image_id,site\na,x\nb,x,y\n",
            " line 3: found 3 cells, the header has 2; put quotes around a cell that holds a "
            "separator",
        ),
        (
            'image_id,site\na,"x\nb,x\n',
            " line 2: damaged table (a quote is not closed); save it as CSV in UTF-8",
        ),
        (
            'image_id,site,group\na,x,"p\nb,x,"q\n',
            " line 2: damaged table (',' expected after '\"'); save it as CSV in UTF-8",
        ),
        (
            'image_id,site,group\na,x,"p\nb,x,q"\n',
            " line 2: a cell goes on over several lines; close its quote",
        ),
        (
            "image_id,site\na,x/y\nb,x\n",
            " line 2: site 'x/y' cannot name a client's folder; avoid / \\ : and a dot in "
            "front, and 'server'",
        ),
        (
            "image_id,site\na,x\0\nb,x\n",
            " line 2: site 'x\\x00' cannot name a client's folder; avoid / \\ : and a dot in "
            "front, and 'server'",
        ),
        (
            "image_id,site\na,server\nb,x\n",
            " line 2: site 'server' cannot name a client's folder; avoid / \\ : and a dot in "
            "front, and 'server'",
        ),
        (
            "image_id,site\na,..\nb,x\n",
            " line 2: site '..' cannot name a client's folder; avoid / \\ : and a dot in "
            "front, and 'server'",
        ),
    ],
)
def test_a_wrong_sites_table(root: Path, text: str, expected: str) -> None:
    write_sites(root, text)
    assert scan_refusal(root, "sites.csv") == expected


def test_a_sites_table_that_is_no_utf8(root: Path) -> None:
    write_sites(root, "image_id,site\na,K\u00f6ln\nb,x\n", "latin-1")
    assert scan_refusal(root, "sites.csv") == (
        ": not in UTF-8, line 2 has the byte 0xf6, a letter in Latin-1; save it as CSV in UTF-8"
    )
    write_sites(root, "image_id,site\na,x\nb,x\n", "utf-16")
    assert scan_refusal(root, "sites.csv") == (
        ": not in UTF-8, it begins as UTF-16 does; save it as CSV in UTF-8"
    )


def test_a_damaged_sites_table(root: Path) -> None:
    write_sites(root, 'image_id,site\na,"x\nb,x\n' + "y" * 200_000)  # a quote without its end
    assert scan_refusal(root, "sites.csv") == (
        " line 2: damaged table (field larger than field limit (131072)); save it as CSV in UTF-8"
    )


def test_a_site_named_outside_ascii(root: Path) -> None:
    write_sites(root, "image_id,site\na,K\u00f6ln\nb,x\n")
    assert scan(root).images["a"].site == "K\u00f6ln"


@pytest.mark.parametrize("name", ["Sites.csv", "sites.xlsx", "SITES.CSV"])
def test_a_table_under_another_name_is_named(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (root / name).touch()
    if (root / "sites.csv").exists():
        pytest.skip("this file system does not tell Sites.csv from sites.csv")
    assert scan(root).images["a"].site == "site"
    assert caplog.messages == [f"{root}/{name}: is not read; save the table of sites as sites.csv"]


def test_a_table_that_cannot_be_read_is_not_left_out(root: Path) -> None:
    (root / "sites.csv").symlink_to(root / "nowhere.csv")
    advice = "; check its permissions and its disk"
    assert (
        scan_refusal(root, "sites.csv") == f": cannot be read (No such file or directory){advice}"
    )
    (root / "sites.csv").unlink()
    (root / "sites.csv").mkdir()
    assert scan_refusal(root, "sites.csv") == f": cannot be read (Is a directory){advice}"


def messy(root: Path) -> list[tuple[str, str]]:
    return [(files.site, files.group) for files in scan(root).images.values()]


@pytest.mark.parametrize(
    "text",
    [
        " image_id , Site,GROUP\na , north, p1\nb,north ,p1 \n",
        "image_id,site,group,\n\na,north,p1,\n,,,\nb,north,p1,,\n , \n",
        "image_id;site;group\r\na;north;p1\r\nb;north;p1\r\n",
        "image_id\tsite\tgroup\na\tnorth\tp1\nb\tnorth\tp1",
        "image_id,site,group\na.png,north,p1\nimages/b.PNG,north,p1\n",
        "image_id,site,group\nC:\\data\\a.jpg,north,p1\nb,north,p1\n",
        'image_id,site,group\n"a", "north","p1"\nb,north,p1\n',
        "group,number,site,image_id\np1,1,north,a\np1,2,north,b\n",
    ],
)
def test_a_table_as_people_write_it(root: Path, text: str) -> None:
    write_sites(root, text, "utf-8-sig")
    assert messy(root) == [("north", "north/p1")] * 2


def test_an_id_that_looks_like_a_file_is_taken_as_it_is_first(root: Path) -> None:
    save(root / "images" / "a.png.png", RGB)
    write_sites(root, "image_id,site\na,x\nb,x\na.png,y\n")
    assert [files.site for files in scan(root).images.values()] == ["x", "y", "x"]


def test_a_site_is_one_however_its_name_is_encoded(root: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "K\u00f6ln")
    write_sites(root, f"image_id,site,group\na,K\u00f6ln,\u00fc\nb,{decomposed},u\u0308\n")
    assert messy(root) == [("K\u00f6ln", "K\u00f6ln/\u00fc")] * 2


@pytest.mark.parametrize("group", sorted(NO_GROUP | {"NA", "N/A", "None", " "}))
def test_no_group_is_never_one_large_group(
    root: Path, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_sites(root, f"image_id,site,group\na,x,{group}\nb,x,{group}\n")
    assert messy(root) == [("x", "x/a"), ("x", "x/b")]
    assert caplog.messages == [
        f"{root}/sites.csv: 2 images have no group (found '{group.strip()}'); each is a group of "
        "its own"
    ]


def test_sites_that_differ_in_case_alone_are_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sites(root, "image_id,site\na,B\nb,b\n")
    assert [site for site, _ in messy(root)] == ["B", "b"]
    assert caplog.messages == [
        f"{root}/sites.csv: sites that differ in case alone: B, b; they stay apart, so rename them "
        "if they are one, or if your file system ignores case"
    ]


CELLS = st.text('a1,; "\r\u00e9\0', max_size=4) | st.sampled_from(
    ["a", "b", 'x"', "site", ",", ";", "na", " a.png", "\n", '"']
)


def test_any_table_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "sites.csv", set[str]()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.lists(CELLS, max_size=4), max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
    def check(rows: list[list[str]], end: str) -> None:
        lines = ["image_id,site,group", "a,x,p", *(",".join(row) for row in rows)]
        path.write_bytes(end.join(lines).encode())
        try:
            found = read_sites(path, ["a"], endings=(".png",))
        except DataError as error:
            outcomes.add("refused")
            assert str(error).startswith(f"{path}")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            return
        outcomes.add("read")
        assert found.rows == {"a": ("x", "x/p")}

    check()
    assert outcomes == {"read", "refused"}


@given(st.lists(st.text("ab1_-. \u00e9", min_size=1, max_size=5), unique=True, min_size=1))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_a_suggested_pattern_fits(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    root = tmp_path_factory.mktemp("names")
    ids = [each for each in ids if not each.startswith(".")]
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for each in ids:
        (root / "images" / f"{each}.png").touch()
        (root / "masks" / f"truth {each}.gif").touch()
    if ids:
        found = scan(root, mask_pattern=suggest_mask_pattern(root) or "").images
        assert {i: files.mask for i, files in found.items()} == {
            each: f"masks/truth {each}.gif" for each in ids
        }


def test_the_default_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    root = tmp_path / "data" / "synthetic"
    with pytest.raises(DataError) as caught:
        scan(root)
    assert str(caught.value).endswith(
        "; for images of your own run `samfed init FOLDER`, for generated ones "
        f"`samfed synth {root}`"
    )
    with pytest.raises(DataError) as other:
        scan(tmp_path / "mine")
    assert str(other.value).endswith(" in data.root")


# --------------------------------------------------------------------------- spacing.csv


def test_spacing_is_read_for_the_images_that_have_it(root: Path) -> None:
    """As an import writes it, rows of images that are gone included."""
    assert scan(root).spacing == {}
    text = "image_id,row_mm,column_mm,slice_mm\na.png,0.5, 1.25,\ngone,1,1,3\n"
    (root / "spacing.csv").write_text(text)
    assert scan(root).spacing == {"a": (0.5, 1.25)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image_id,row_mm\na,1\n", ": found columns ['image_id', 'row_mm']; expected image_id, "
         "row_mm, column_mm"),
        ("image_id,row_mm,column_mm\na,1,0\n", " line 2: found '1' and '0'; expected millimetres "
         "above 0, or no row where they are not known"),
        ("image_id,row_mm,column_mm\na,,1\n", " line 2: found '' and '1'; expected millimetres "
         "above 0, or no row where they are not known"),
        ("image_id,row_mm,column_mm\na,1,1\na,1,1\n", " line 3: 'a' is listed twice"),
    ],
)  # fmt: skip
def test_a_wrong_table_of_spacing(root: Path, text: str, expected: str) -> None:
    (root / "spacing.csv").write_text(text)
    assert scan_refusal(root, "spacing.csv") == expected
