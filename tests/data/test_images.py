"""Every file format that is read, and one clear line for every file that cannot be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import images
from pipeline.data.images import (
    load_image,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from pipeline.disk import file_sha256
from pipeline.errors import DataError

RGB = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
ORIENTATION = 0x0112


def save(path: Path, values: NDArray[np.generic], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)  # type: ignore[arg-type]
    return path


def read(path: Path) -> NDArray[np.uint8]:
    return read_image(path).pixels


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images, the first with a mask."""
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", RGB)
    save(tmp_path / "masks" / "a.png", np.eye(6, 4, dtype=np.uint8))
    return tmp_path


# --------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "PNG"])
def test_lossless_formats_keep_every_value(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x.{suffix}", RGB)
    found = read(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, RGB)


def test_jpeg(tmp_path: Path) -> None:
    smooth = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    found = read(save(tmp_path / "x.jpg", smooth, quality=95))
    assert found.shape == (16, 24, 3)
    assert np.abs(found.astype(int) - smooth).max() <= 3


def test_grey_is_repeated_over_the_channels(tmp_path: Path) -> None:
    found = read(save(tmp_path / "x.png", RGB[:, :, 0]))
    np.testing.assert_array_equal(found, np.repeat(RGB[:, :, :1], 3, axis=2))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.concatenate([RGB, np.full((6, 4, 1), 7, np.uint8)], axis=2)
    np.testing.assert_array_equal(read(save(tmp_path / "x.png", rgba)), RGB)


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\xff"])
def test_palette_gives_its_colours(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    extra = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "x.png", **extra)
    first, second = [10, 20, 30], [40, 50, 60]
    assert read(tmp_path / "x.png").tolist() == [[first, second], [second, first]]


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    found = read(save(tmp_path / "x.png", bits))
    assert found[:, :, 0].tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_from_its_own_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[1000, 2000], [3000, 1500]], np.uint16)
    found = read(save(tmp_path / f"x.{suffix}", values))
    assert found[:, :, 0].tolist() == [[0, 128], [255, 64]]  # 127.5 rounds to the even number
    assert (found == found[:, :, :1]).all()


@pytest.mark.parametrize("value", [0, 4095, 65535])
def test_a_constant_16_bit_image_is_black(tmp_path: Path, value: int) -> None:
    found = read(save(tmp_path / "x.png", np.full((3, 2), value, np.uint16)))
    assert found.shape == (3, 2, 3)
    assert not found.any()


def test_a_float_image_with_holes_is_refused_or_finite(tmp_path: Path) -> None:
    values = np.array([[0.0, np.nan], [1.0, 2.0]], np.float32)
    path = save(tmp_path / "x.tif", values)
    assert "not finite" in refusal(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise: left becomes top
    found = read(save(tmp_path / f"x.{suffix}", wide, exif=exif))
    assert found.shape == (32, 16, 3)
    assert found[:14].min() > 250
    assert found[18:].max() < 5


def test_only_the_first_page_of_a_tiff_is_read(tmp_path: Path) -> None:
    pages = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read(tmp_path / "x.tif"), RGB)


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = save(tmp_path / f"x.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    text = refusal(path)
    assert "damaged image" in text
    assert text.endswith("; replace or remove it")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_damaged_bytes_give_an_image_or_a_refusal(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 300), 3):
            content[place] = rng.integers(256)
        path.write_bytes(bytes(content[: rng.integers(1, len(content) + 1)]))
        refused = ""
        try:
            found = read(path)
        except DataError as error:
            refused = str(error)
        if refused:
            assert refused.startswith(f"{path}: ")
            assert "\n" not in refused
        else:
            assert found.ndim == 3
            assert found.dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert "replace or remove it" in refusal(path)


@pytest.mark.parametrize("kind", ["GIF", "EPS"])
def test_another_format_under_a_known_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, kind)
    assert refusal(path) == f"{path}: not an image that can be read; replace or remove it"


def test_missing_image(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    assert refusal(path) == f"{path}: no such file; run `samfed prepare` again"


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    path = save(tmp_path / "x.png", RGB)
    assert refusal(path) == f"{path}: 4 x 6 pixels; at most 23 are read; scale it down"


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.bmp", RGB)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert refusal(path) == (
        f"{path}: {path.stat().st_size} bytes; at most 100 are read; scale it down"
    )


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    assert refusal(tmp_path / "x.png") == (
        f"{tmp_path}/x.png: cannot be read (Is a directory); check its permissions and its disk"
    )


def test_changed_since_prepare(root: Path) -> None:
    path = root / "images" / "a.png"
    digest = file_sha256(path)
    np.testing.assert_array_equal(load_image(root, "images/a.png", sha256=digest), RGB)
    save(path, RGB + 1)
    with pytest.raises(DataError) as caught:
        load_image(root, "images/a.png", sha256=digest)
    assert str(caught.value) == (
        f"{path}: changed since `samfed prepare`; run `samfed prepare` again"
    )


def test_gone_since_prepare(root: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; run `samfed prepare` again"):
        load_image(root, "images/c.png", sha256="0" * 64)


# --------------------------------------------------------------------------- masks


@pytest.mark.parametrize("foreground", [1, 255])
def test_binary_masks(tmp_path: Path, foreground: int) -> None:
    path = save(tmp_path / "m.png", np.array([[0, foreground]], np.uint8))
    found = read_mask(path, size_hw=(1, 2), num_classes=1).pixels
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 1]]


def test_a_grey_mask_in_three_channels_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.repeat(np.array([[[0], [255]]], np.uint8), 3, axis=2))
    assert read_mask(path, size_hw=(1, 2), num_classes=1).pixels.tolist() == [[0, 1]]


def test_a_one_bit_and_a_palette_mask_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[True, False]]))
    assert read_mask(path, size_hw=(1, 2), num_classes=1).pixels.tolist() == [[1, 0]]
    palette = Image.fromarray(np.array([[2, 0, 1]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette = Image.frombytes("P", (3, 1), bytes([2, 0, 1]))
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(path)
    assert read_mask(path, size_hw=(1, 3), num_classes=2).pixels.tolist() == [[2, 0, 1]]


def test_a_colour_mask_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", RGB)
    with pytest.raises(DataError) as caught:
        read_mask(path, size_hw=(6, 4), num_classes=1)
    assert str(caught.value) == (f"{path}: a colour image; expected class indices in one channel")


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(DataError) as caught:
        read_mask(path, size_hw=(6, 4), num_classes=1)
    assert str(caught.value) == (
        f"{path}: mask is 6 x 4 pixels, its image is 4 x 6; they must be equal"
    )


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 1, 3]], np.uint8))
    assert read_mask(path, size_hw=(1, 3), num_classes=3).pixels.tolist() == [[0, 1, 3]]
    with pytest.raises(DataError) as caught:
        read_mask(path, size_hw=(1, 3), num_classes=2)
    assert str(caught.value) == f"{path}: found class 3, expected 0..2 (data.num_classes)"


def test_a_truncated_mask_is_refused(root: Path) -> None:
    path = root / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="replace or remove it"):
        read_mask(path, size_hw=(6, 4), num_classes=1)


def test_resizing(tmp_path: Path) -> None:
    assert resize_image(RGB, 8).shape == (8, 8, 3)
    mask = np.array([[0, 2], [2, 0]], np.uint8)
    assert resize_mask(mask, 4).tolist() == np.kron(mask, np.ones((2, 2), int)).tolist()


def test_decoding_leaves_no_file_open(tmp_path: Path) -> None:
    # pytest turns the ResourceWarning of an unclosed file into a failure
    noise = io.BytesIO()
    Image.fromarray(RGB).save(noise, "png")
    (tmp_path / "x.png").write_bytes(noise.getvalue()[:-30])
    with pytest.raises(DataError):
        read(tmp_path / "x.png")
