"""Every file format that is read, and one clear line for every file that cannot be."""

from __future__ import annotations

import errno
import io
import os
import struct
import threading
import time
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import RGB, save
from PIL import Image, TiffImagePlugin

from pipeline.data import decoding
from pipeline.data.images import (
    load_image,
    read_image,
    resize_image,
    resize_mask,
)
from pipeline.data.reading import map_ahead
from pipeline.disk import file_sha256
from pipeline.errors import DataError

ORIENTATION = 0x0112


def read(path: Path) -> NDArray[np.uint8]:
    return read_image(path).pixels


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


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


# --------------------------------------------------------------------------- depth and pages


def tiff(values: NDArray[np.uint16], *, order: str = "<", planar: bool = False) -> bytes:
    """Return an uncompressed TIFF of several channels (H, W, C) of 16 bits."""
    height, width, channels = values.shape
    stored = np.moveaxis(values, -1, 0) if planar else values
    pixels = stored.astype(f"{order}u2").tobytes()
    bits = np.full(channels, 16, f"{order}u2").tobytes()
    planes = channels if planar else 1
    size = len(pixels) // planes
    offsets = 8 + size * np.arange(planes)
    tail = 8 + len(pixels)
    extra = bits + offsets.astype(f"{order}u4").tobytes()
    extra += np.full(planes, size, f"{order}u4").tobytes()
    places, many = (tail + len(bits), tail + len(bits) + 4 * planes), planes > 1
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, tail if channels > 2 else 16 * 65537),
        (262, 4, 1, 1 if channels == 2 else 2),
        (273, 4, planes, places[0] if many else 8),
        (277, 4, 1, channels),
        (278, 4, 1, height),
        (279, 4, planes, places[1] if many else size),
        (284, 4, 1, 2 if planar else 1),
    ] + [(338, 4, 1, 2)] * (channels in (2, 4))
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, tail + len(extra))
    tags = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return start + pixels + extra + struct.pack(f"{order}H", len(entries)) + tags + bytes(4)


DEEP = np.array([[[1000, 2000, 3000], [1500, 1000, 2500]]], np.uint16)  # 12 bits of 16
DEEP_IN_8_BITS = [[[0, 128, 255], [64, 0, 191]]]  # one scale for all channels


@pytest.mark.parametrize("channels", ["RGB", "RGBA", "LA"])
def test_16_bits_of_png_are_scaled_over_all_colours_jointly(tmp_path: Path, channels: str) -> None:
    alpha = np.full((1, 2, 1), 65535, np.uint16)
    kinds = {"RGB": DEEP, "RGBA": np.dstack([DEEP, alpha]), "LA": np.dstack([DEEP[..., :1], alpha])}
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(kinds[channels]))
    grey = [[[0, 0, 0], [255, 255, 255]]]
    assert read(tmp_path / "x.png").tolist() == (grey if channels == "LA" else DEEP_IN_8_BITS)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", ["RGB", "RGBA", "LA"])
def test_16_bits_of_tiff_are_scaled_over_all_colours_jointly(
    tmp_path: Path, channels: str, order: str, planar: bool
) -> None:
    alpha = np.full((1, 2, 1), 65535, np.uint16)
    kinds = {"RGB": DEEP, "RGBA": np.dstack([DEEP, alpha]), "LA": np.dstack([DEEP[..., :1], alpha])}
    (tmp_path / "x.tif").write_bytes(tiff(kinds[channels], order=order, planar=planar))
    grey = [[[0, 0, 0], [255, 255, 255]]]
    assert read(tmp_path / "x.tif").tolist() == (grey if channels == "LA" else DEEP_IN_8_BITS)


def test_deep_colour_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(np.ones((2, 2, 5), np.uint16)))
    assert refusal(tmp_path / "x.tif") == (
        f"{tmp_path}/x.tif: 5 channels of 16 bits (photometric 2); expected grey, grey and alpha, "
        "RGB or RGBA; save it so"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_as_others_are(tmp_path: Path, orientation: int) -> None:
    values = np.arange(0, 18 * 15, 15).clip(max=255).astype(np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    save(tmp_path / "x.png", values, exif=exif)
    deep = imagecodecs.png_encode(values.astype(np.uint16))  # 0..255: scaled to itself
    chunk = b"eXIf" + exif.tobytes()[6:]
    sealed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "deep.png").write_bytes(deep[:-12] + sealed + deep[-12:])
    np.testing.assert_array_equal(read(tmp_path / "deep.png"), read(tmp_path / "x.png"))
    assert read_image(tmp_path / "deep.png").orientation == orientation


@pytest.mark.parametrize("suffix", ["tif", "png", "gif"])
def test_several_pages_or_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(np.full((4, 4, 3), grey, np.uint8)) for grey in (0, 99, 255)]
    path = tmp_path / f"x.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert refusal(path) == (
        f"{path}: 3 pages or frames; expected one image a file; save the one that is meant, or "
        "each under a name of its own"
    )


def test_a_tiffs_smaller_copies_are_no_pages(tmp_path: Path) -> None:
    """As NewSubfileType (tag 254) marks them; unmarked they count, and so does the first page."""
    path = tmp_path / "x.tif"

    def write(*kinds: int) -> None:
        with TiffImagePlugin.AppendingTiffWriter(str(path), new=True) as file:
            for place, kind in enumerate(kinds):
                page = Image.fromarray(RGB if place == 0 else RGB[::2, ::2])
                page.save(file, "TIFF", tiffinfo={254: kind})
                file.newFrame()

    write(0, 1, 1)
    np.testing.assert_array_equal(read(path), RGB)
    for kinds in ((0, 1, 0), (1, 0)):
        write(*kinds)
        assert "2 pages or frames" in refusal(path)


def test_further_pictures_in_a_jpeg_are_previews(tmp_path: Path) -> None:
    main, preview = (Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (200, 10))
    main.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview])
    assert (read(tmp_path / "x.jpg") == 200).all()


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = save(tmp_path / f"x.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    text = refusal(path)
    assert "damaged image" in text
    assert text.endswith("; replace or remove it")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "deep.png", "deep.tif"])
def test_damaged_bytes_give_an_image_or_a_refusal(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    if suffix.startswith("deep"):
        deep = noise.astype(np.uint16) * 257
        whole = tiff(deep) if suffix == "deep.tif" else imagecodecs.png_encode(deep)
    else:
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


def test_another_format_under_a_known_name(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, "EPS")
    assert refusal(path) == (
        f"{path}: not an image that can be read; expected the content of a PNG, JPEG, TIFF, "
        "BMP or GIF; replace or remove it"
    )


def test_missing_image(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    assert refusal(path) == f"{path}: no such file; check data.root, or run `samfed prepare` again"


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 23)
    path = save(tmp_path / "x.png", RGB)
    assert refusal(path) == f"{path}: 4 x 6 pixels; at most 23 are read; scale it down"


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.bmp", RGB)
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    assert refusal(path) == (
        f"{path}: {path.stat().st_size} bytes; at most 100 are read; scale it down"
    )


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    assert refusal(tmp_path / "x.png") == (
        f"{tmp_path}/x.png: cannot be read (Is a directory); check its permissions and its disk"
    )


def test_a_broken_link_is_named_with_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to("../elsewhere/x.png")
    assert refusal(tmp_path / "x.png") == (
        f"{tmp_path}/x.png: cannot be read (a link to ../elsewhere/x.png, which is not there); "
        "mend the link, or mount what it points to"
    )


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    assert "cannot be read (a pipe or a device)" in refusal(tmp_path / "x.png")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_failing_disk_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = save(tmp_path / "x.png", RGB)

    def fail(self: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert refusal(path) == (
        f"{path}: cannot be read ({os.strerror(number)}); check its permissions and its disk"
    )


def test_changed_since_prepare(tmp_path: Path) -> None:
    path = save(tmp_path / "images" / "a.png", RGB)
    digest = file_sha256(path)
    np.testing.assert_array_equal(load_image(tmp_path, "images/a.png", sha256=digest), RGB)
    save(path, RGB + 1)
    with pytest.raises(DataError) as caught:
        load_image(tmp_path, "images/a.png", sha256=digest)
    assert str(caught.value) == (
        f"{path}: changed since `samfed prepare`; run `samfed prepare` again"
    )


def test_gone_since_prepare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"; check data\.root, or run `samfed prepare` again"):
        load_image(tmp_path, "images/c.png", sha256="0" * 64)


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


def test_images_are_read_on_the_cores_that_the_process_is_bound_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch system gives a few cores of many; a thread for each of all would only need memory."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)

    def reader(item: int) -> tuple[int, int]:
        time.sleep(0.002)
        return item, threading.get_ident()

    found = [*map_ahead(reader, range(10))]
    assert [item for item, _ in found] == [*range(10)]
    assert len({thread for _, thread in found}) == 1
