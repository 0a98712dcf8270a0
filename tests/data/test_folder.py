"""Which file is which image's, and one clear line for every folder or table that is not clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.folder import scan
from pipeline.errors import DataError

RGB = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3


def save(path: Path, values: NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


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
    found = scan(root)
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


# --------------------------------------------------------------------------- sites.csv


def write_sites(root: Path, text: str, encoding: str = "utf-8") -> None:
    (root / "sites.csv").write_bytes(text.encode(encoding))


def test_sites(root: Path) -> None:
    write_sites(root, "image_id,site,group\na,north,p1\nb,south,p1\n")
    found = scan(root)
    assert (found["a"].site, found["a"].group) == ("north", "north/p1")
    assert (found["b"].site, found["b"].group) == ("south", "south/p1")  # another p1


def test_sites_with_a_byte_order_mark_and_no_groups(root: Path) -> None:
    write_sites(root, "image_id,site\r\na,north\r\nb,north\r\n", "utf-8-sig")
    assert [record.group for record in scan(root).values()] == ["north/a", "north/b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "image_id,hospital\na,x\nb,x\n",
            ": found columns ['image_id', 'hospital']; expected image_id, site and optionally "
            "group",
        ),
        ("", ": found columns None; expected image_id, site and optionally group"),
        ("image_id,site\na,x\n", ": no row for image 'b' (1 images lack one)"),
        ("image_id,site\na,x\nb,x\na,y\n", " line 4: 'a' is listed twice"),
        ("image_id,site\na,x\nb,\n", " line 3: empty image_id or site"),
        ("image_id,site\na,x\nb\n", " line 3: empty image_id or site"),
        (
            "image_id,site\na,x/y\nb,x\n",
            " line 2: site 'x/y' cannot name a client's folder; avoid / \\ : and a dot in "
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
    text = scan_refusal(root, "sites.csv")
    assert text.startswith(": damaged table ('utf-8' codec can't decode byte 0xf6")
    assert text.endswith("; save it as CSV in UTF-8")


def test_a_damaged_sites_table(root: Path) -> None:
    write_sites(root, 'image_id,site\na,"x\nb,x\n' + "y" * 200_000)  # a quote without its end
    assert scan_refusal(root, "sites.csv") == (
        ": damaged table (field larger than field limit (131072)); save it as CSV in UTF-8"
    )


def test_a_site_named_outside_ascii(root: Path) -> None:
    write_sites(root, "image_id,site\na,K\u00f6ln\nb,x\n")
    assert scan(root)["a"].site == "K\u00f6ln"
