"""What masks mean: each way in which people save a shape, and a refusal where it is not clear."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.masks import ALPHA, PALETTE, THRESHOLD, Mask, read_mask
from pipeline.errors import DataError

SIZE = 64
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE]
DISC = (ROWS - 32) ** 2 + (COLUMNS - 30) ** 2 < 16**2  # 19.6 % of the image
ONE = "; expected one channel of two values, 0 for background; save the mask as grey PNG"
ONE_OF_GREY = "; expected one channel of two values, 0 for background; threshold the mask"
TWO_OF_GREY = (
    "; expected class indices 0..2 (data.num_classes) in one channel; renumber its values, or "
    "change that"
)
TWO = "; expected class indices 0..2 (data.num_classes) in one channel; save the mask as grey PNG"


def read(image: Image.Image, path: Path, classes: int = 1, **options: object) -> Mask:
    path = path / "m.png"
    image.save(path, **options)  # type: ignore[arg-type]
    return read_mask(path, size_hw=(image.height, image.width), num_classes=classes)


def read_content(content: bytes, path: Path, classes: int = 1) -> Mask:
    (path / "m.png").write_bytes(content)
    return read_mask(path / "m.png", size_hw=(SIZE, SIZE), num_classes=classes)


def refusal(image: Image.Image, path: Path, classes: int = 1, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read(image, path, classes, **options)
    text = str(caught.value)
    assert text.startswith(f"{path}/m.png: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}/m.png: ")


def grey(values: NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(values)


def palette(indices: NDArray[np.uint8], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def shape(found: Mask) -> NDArray[np.bool_]:
    assert found.pixels.dtype == np.uint8
    assert found.pixels.max() <= 1
    return found.pixels == 1


# --------------------------------------------------------------------------- one class


@pytest.mark.parametrize("foreground", [1, 7, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_two_values_are_taken_as_they_stand(tmp_path: Path, foreground: int, dtype: type) -> None:
    found = read(grey((DISC * foreground).astype(dtype)), tmp_path)
    np.testing.assert_array_equal(shape(found), DISC)
    assert found.decisions == ()


def test_one_bit_and_equal_channels_are_taken_as_they_stand(tmp_path: Path) -> None:
    for image in (grey(DISC), grey(np.repeat(DISC[:, :, None] * np.uint8(255), 3, axis=2))):
        found = read(image, tmp_path)
        np.testing.assert_array_equal(shape(found), DISC)
        assert found.decisions == ()


def test_a_16_bit_mask_of_value_200(tmp_path: Path) -> None:
    content = imagecodecs.png_encode(np.repeat((DISC * np.uint16(200))[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(shape(read_content(content, tmp_path)), DISC)


def test_float_masks_of_two_values(tmp_path: Path) -> None:
    grey(DISC.astype(np.float32)).save(tmp_path / "m.tif")
    found = read_mask(tmp_path / "m.tif", size_hw=(SIZE, SIZE), num_classes=1)
    np.testing.assert_array_equal(shape(found), DISC)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_empty_and_full_masks(tmp_path: Path, value: int) -> None:
    found = read(grey(np.full((4, 4), value, np.uint8)), tmp_path)
    assert (shape(found) == (value > 0)).all()


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (128, 0, 0)


@pytest.mark.parametrize(
    "colours", [(BLACK, WHITE), (WHITE, BLACK), (RED, (5, 5, 9)), (BLACK, RED), ((1, 1, 1), BLACK)]
)
def test_palettes_are_decided_by_colour(
    tmp_path: Path, colours: tuple[tuple[int, int, int]]
) -> None:
    brightest = int(np.argmax([max(colour) for colour in colours]))
    found = read(
        palette(np.where(DISC, brightest, 1 - brightest).astype(np.uint8), *colours), tmp_path
    )
    np.testing.assert_array_equal(shape(found), DISC)
    assert found.decisions == (PALETTE,)


@pytest.mark.parametrize(
    ("colours", "expected"),
    [
        ((RED, WHITE), "does not say what is background: (128, 0, 0), (255, 255, 255); expected"),
        ((BLACK, (50, 0, 0)), "does not say what is background: (0, 0, 0), (50, 0, 0); expected"),
        ((RED, RED), "a palette of one colour, (128, 0, 0)"),
        (((90, 90, 90), (200, 200, 200)), "greys of the palette 90, 200, "),
    ],
)
def test_unclear_palettes_are_refused(
    tmp_path: Path, colours: tuple[tuple[int, int, int]], expected: str
) -> None:
    text = refusal(palette(DISC.astype(np.uint8), *colours), tmp_path)
    assert expected in text
    assert text.endswith(ONE)


def test_a_palette_of_three_colours_is_refused(tmp_path: Path) -> None:
    indices = (DISC + (COLUMNS > 60)).astype(np.uint8)
    indices[COLUMNS > 60] = 2
    text = refusal(palette(indices, BLACK, RED, (0, 128, 0)), tmp_path)
    assert "(0, 0, 0), (0, 128, 0), (128, 0, 0)" in text


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_shape_that_is_only_in_alpha(tmp_path: Path, mode: str, colour: int) -> None:
    layers = np.full((SIZE, SIZE, 4 if mode == "RGBA" else 2), colour, np.uint8)
    layers[:, :, -1] = DISC * 255
    found = read(grey(layers), tmp_path)
    np.testing.assert_array_equal(shape(found), DISC)
    assert found.decisions == (ALPHA,)


def test_a_shape_that_is_only_in_a_palettes_transparency(tmp_path: Path) -> None:
    found = read(palette(DISC.astype(np.uint8), BLACK, BLACK), tmp_path, transparency=b"\x00\xff")
    np.testing.assert_array_equal(shape(found), DISC)
    assert found.decisions == (ALPHA,)


def test_a_smooth_shape_in_alpha_is_cut_at_half(tmp_path: Path) -> None:
    smooth = np.asarray(grey(DISC).convert("L").resize((32, 32), Image.Resampling.BILINEAR))
    layers = np.zeros((32, 32, 4), np.uint8)
    layers[:, :, 3] = smooth
    found = read(grey(layers), tmp_path)
    np.testing.assert_array_equal(shape(found), smooth > 127.5)
    assert found.decisions == (ALPHA, THRESHOLD)


def test_constant_alpha_or_the_same_shape_in_alpha_says_nothing_new(tmp_path: Path) -> None:
    values = DISC[:, :, None] * np.uint8(255)
    for alpha in (np.full_like(values, 255), np.full_like(values, 9), values):
        found = read(grey(np.concatenate([values] * 3 + [alpha], axis=2)), tmp_path)
        np.testing.assert_array_equal(shape(found), DISC)
        assert found.decisions == ()


def test_another_shape_in_alpha_is_refused(tmp_path: Path) -> None:
    values = DISC[:, :, None] * np.uint8(255)
    text = refusal(grey(np.concatenate([values] * 3 + [values[::-1]], axis=2)), tmp_path)
    assert text == f"colour and alpha show different shapes{ONE}"


@pytest.mark.parametrize("quality", [75, 90, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_masks_are_cut_at_half(tmp_path: Path, quality: int, mode: str) -> None:
    path = tmp_path / "m.jpg"
    grey(DISC).convert(mode).save(path, quality=quality)
    found = read_mask(path, size_hw=(SIZE, SIZE), num_classes=1)
    assert (shape(found) != DISC).mean() < 0.002
    assert found.decisions == (THRESHOLD,)


@pytest.mark.parametrize("size", [24, 32, 48, 128, 256])
def test_anti_aliased_masks_are_cut_at_half(tmp_path: Path, size: int) -> None:
    smooth = grey(DISC).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    found = read(smooth, tmp_path)
    np.testing.assert_array_equal(shape(found), np.asarray(smooth) > 127.5)
    assert abs(shape(found).mean() - DISC.mean()) < 0.01
    assert found.decisions == (THRESHOLD,)


def test_16_bit_masks_are_cut_at_half_of_their_own_depth(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3000, DISC.shape)
    values = np.where(DISC, 40_000 - noise, noise).astype(np.uint16)
    found = read(grey(values), tmp_path)
    np.testing.assert_array_equal(shape(found), DISC)
    assert found.decisions == (THRESHOLD,)


def soft_map() -> NDArray[np.uint8]:
    distance = np.hypot(ROWS - 32, COLUMNS - 30)
    return (255 / (1 + np.exp((distance - 16) / 4))).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (soft_map(), "values 0, 1, 2, 3, 4, 5, 6 ... 2"),
        ((ROWS * 4).astype(np.uint8), "values 0, 4, 8, 12, 16, 20, 24 ... 252 (64 of them)"),
        (np.random.default_rng(0).integers(0, 256, DISC.shape, dtype=np.uint8), "values 0, 1, 2"),
        # classes, as greys or with one value for "ignore", would be merged or lost by a cut
        (np.where(DISC, 128, (COLUMNS > 55) * 255).astype(np.uint8), "values 0, 128, 255, "),
        (
            np.where(DISC, 1, (COLUMNS > 60) * 255).astype(np.uint8),
            "values 0, 1, 255 (several classes?)",
        ),
        (DISC.astype(np.uint8) + np.roll(DISC, 20, 0), "values 0, 1, 2 (several classes? then"),
        ((DISC + 1).astype(np.uint8), "values 1, 2 (several classes?"),
        (np.where(DISC, 200, 150).astype(np.uint8), "values 150, 200, "),
    ],
)
def test_grey_that_is_no_mask_is_refused(
    tmp_path: Path, values: NDArray[np.uint8], found: str
) -> None:
    text = refusal(grey(values), tmp_path)
    assert text.startswith(found)
    assert text.endswith(ONE_OF_GREY)


def test_colour_is_refused(tmp_path: Path) -> None:
    red = np.zeros((SIZE, SIZE, 3), np.uint8)
    red[DISC] = RED
    text = refusal(grey(red), tmp_path)
    assert text == f"a colour image of (0, 0, 0), (128, 0, 0){ONE}"


def test_cmyk_is_refused(tmp_path: Path) -> None:
    grey(DISC).convert("L").convert("CMYK").save(tmp_path / "m.tif")
    with pytest.raises(DataError) as caught:
        read_mask(tmp_path / "m.tif", size_hw=(SIZE, SIZE), num_classes=1)
    assert str(caught.value) == f"{tmp_path}/m.tif: CMYK colours{ONE}"


def test_masks_that_are_not_finite_or_negative_are_refused(tmp_path: Path) -> None:
    for value, expected in ((np.nan, "not finite"), (-1.0, "values -1, 0")):
        grey(np.array([[0, value]], np.float32)).save(tmp_path / "m.tif")
        with pytest.raises(DataError, match=expected):
            read_mask(tmp_path / "m.tif", size_hw=(1, 2), num_classes=1)


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tif", "jpg"])
def test_masks_in_other_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    grey(DISC).convert("L").save(path)
    found = read_mask(path, size_hw=(SIZE, SIZE), num_classes=1)
    assert (shape(found) != DISC).mean() < 0.002


# --------------------------------------------------------------------------- several classes


CLASSES = DISC.astype(np.uint8) + np.roll(DISC, 9, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_class_indices_of_any_depth(tmp_path: Path, dtype: type) -> None:
    grey(CLASSES.astype(dtype)).save(tmp_path / "m.tif")
    found = read_mask(tmp_path / "m.tif", size_hw=(SIZE, SIZE), num_classes=2)
    np.testing.assert_array_equal(found.pixels, CLASSES)
    assert found.decisions == ()


def test_class_indices_whose_palette_is_decoration(tmp_path: Path) -> None:
    for colours in ((BLACK, RED, (0, 128, 0)), (WHITE, RED, (0, 128, 0)), (BLACK, BLACK, BLACK)):
        found = read(palette(CLASSES, *colours), tmp_path, classes=2)
        np.testing.assert_array_equal(found.pixels, CLASSES)
        assert found.decisions == ()


def test_class_indices_that_a_palette_holds_in_another_order(tmp_path: Path) -> None:
    stored = np.array([2, 0, 1], np.uint8)[CLASSES]  # index 0 is class 1, 1 is 2, 2 is 0
    found = read(palette(stored, (1, 1, 1), (2, 2, 2), BLACK), tmp_path, classes=2)
    np.testing.assert_array_equal(found.pixels, CLASSES)
    assert found.decisions == (PALETTE,)


def test_a_palette_in_an_arbitrary_order_is_refused(tmp_path: Path) -> None:
    text = refusal(palette(CLASSES, RED, BLACK, (0, 128, 0)), tmp_path, classes=2)
    assert text == (
        "a palette in which black is not index 0: (128, 0, 0), (0, 0, 0), (0, 128, 0), so that the "
        f"order of its indices may be arbitrary{TWO}"
    )


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (grey(CLASSES * np.uint8(100)), f"found values 0, 100, 200{TWO_OF_GREY}"),
        (grey(CLASSES + np.uint8(1)), f"found values 1, 2, 3{TWO_OF_GREY}"),
        (palette(CLASSES + np.uint8(1), BLACK, RED, WHITE, RED), f"found values 1, 2, 3{TWO}"),
        (grey(CLASSES).convert("CMYK"), f"CMYK colours{TWO}"),
    ],
)
def test_other_values_than_class_indices_are_refused(
    tmp_path: Path, image: Image.Image, expected: str
) -> None:
    path = tmp_path / "m.tif"
    image.save(path)
    with pytest.raises(DataError) as caught:
        read_mask(path, size_hw=(SIZE, SIZE), num_classes=2)
    assert str(caught.value) == f"{path}: {expected}"


def test_classes_are_whole_numbers(tmp_path: Path) -> None:
    grey(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=r"found values 0, 0\.5, 1; expected class indices"):
        read_mask(tmp_path / "m.tif", size_hw=(1, 3), num_classes=2)


def test_classes_only_in_alpha_are_refused(tmp_path: Path) -> None:
    layers = np.zeros((SIZE, SIZE, 2), np.uint8)
    layers[:, :, 1] = CLASSES
    assert refusal(grey(layers), tmp_path, classes=2) == f"one value, and a shape in alpha{TWO}"


# --------------------------------------------------------------------------- sizes


def size_refusal(path: Path, *, image: int, mask: int, size_hw: tuple[int, int]) -> str:
    exif = Image.Exif()
    exif[0x0112] = mask
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(path / "m.png", exif=exif)
    with pytest.raises(DataError) as caught:
        read_mask(path / "m.png", size_hw=size_hw, num_classes=1, image_orientation=image)
    return str(caught.value).removeprefix(f"{path}/m.png: ")


def test_sizes_say_whether_orientation_explains_them(tmp_path: Path) -> None:
    turned = "mask is 6 x 4 pixels, its image is 4 x 6; they must be equal"
    assert size_refusal(tmp_path, image=1, mask=1, size_hw=(7, 9)) == (
        "mask is 6 x 4 pixels, its image is 9 x 7; they must be equal"
    )
    assert size_refusal(tmp_path, image=6, mask=1, size_hw=(6, 4)) == turned + (
        " (explained by the image's EXIF orientation 6, which the mask lacks: save the image "
        "upright and without it, or turn the mask)"
    )
    assert size_refusal(tmp_path, image=1, mask=8, size_hw=(4, 6)) == (
        "mask is 4 x 6 pixels, its image is 6 x 4; they must be equal (explained by the mask's "
        "EXIF orientation 8, which the image lacks: save the mask upright and without it, or turn "
        "the image)"
    )
    assert size_refusal(tmp_path, image=1, mask=1, size_hw=(6, 4)) == turned + (
        " (not explained by EXIF orientation: mask 1, image 1)"
    )
    assert size_refusal(tmp_path, image=3, mask=1, size_hw=(6, 4)) == turned + (
        " (not explained by EXIF orientation: mask 1, image 3)"
    )


def test_a_truncated_mask_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    grey(DISC).save(content, "PNG")
    with pytest.raises(DataError, match="replace or remove it"):
        read_content(content.getvalue()[:60], tmp_path)
