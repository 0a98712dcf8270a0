"""Frames of DICOM series become images of 8 bits, with the masks of segmentations or beside them.

Errors of the libraries, which may quote what a file holds or where it lies, are never chained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.importers.dicom_files import DicomFiles, File, silence
from pipeline.data.importers.items import Item, Options, Spacing
from pipeline.data.importers.sources import Files
from pipeline.data.importers.volumes import simple_itk, to_grey, window_of
from pipeline.progress import Progress

Array = NDArray[Any]
# by an image's SOPInstanceUID, and by the number (1, 2, ...) of a frame in it
Masks = dict[str, dict[int, NDArray[np.uint8]]]


def read_frames(found: DicomFiles, files: Files, options: Options, progress: Progress) -> Frames:
    """Read every segmentation, and return every frame of every series, sorted by position.

    Patients, and series within each, are numbered in the order of their first files' paths.

    Raises:
        DataError: a file cannot be decoded, also while the frames are taken.
    """
    masks, classes = _read_segmentations(found)
    return Frames(_frames(found, files, masks, options, progress), classes)


class Frames(NamedTuple):
    """Images as they are read, and how many classes DICOM-SEG gives them (0: it gives none)."""

    items: Iterator[Item]
    classes: int


def _frames(
    found: DicomFiles, files: Files, masks: Masks, options: Options, progress: Progress
) -> Iterator[Item]:
    patients: dict[str, int] = {}
    counts: dict[str, int] = {}
    for number, ((patient, _), series) in enumerate(found.series.items(), start=1):
        group = f"p{patients.setdefault(patient, len(patients) + 1):04d}"
        counts[group] = counts.get(group, 0) + 1
        ordered = _in_order(series)
        pixels = [_decode(found, file) for file in ordered]
        spacing, window = _spacing(ordered), _window(ordered, pixels, options.window)
        # frames of a segmented series that the segmentation leaves out hold nothing of it
        segmented = any(file.facts.uid in masks for file in ordered)
        index = 0
        for file, frames in zip(ordered, pixels, strict=True):
            own = masks.get(file.facts.uid, {})
            for k, frame in enumerate(frames, start=1):
                index += 1
                mask: Image.Image | None = None
                if segmented:
                    mask = _fitting(found, file, own.get(k), frame.shape[:2])
                elif file.name in found.masks and len(frames) == 1:
                    mask = _plain(found, file, files[found.masks[file.name]])
                image = Image.fromarray(frame) if frame.ndim == 3 else to_grey(frame, window)
                name = f"{group}_s{counts[group]:02d}_i{index:03d}"
                yield Item(name, image, mask, "dicom", group, spacing)
        progress("reading series", number, len(found.series))


def _decode(found: DicomFiles, file: File) -> Array:
    """Return a file's frames: (N, H, W) rescaled values, MONOCHROME1 inverted, or RGB uint8."""
    sitk = simple_itk()
    try:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(file.path)))
    except RuntimeError:
        raise found.fault(file.number, "cannot be decoded; convert or remove it") from None
    grey = values.ndim == 3
    if not grey and (values.shape[-1] != 3 or values.dtype != np.uint8):
        raise found.fault(file.number, "has colours of more than 8 bits; convert or remove it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise found.fault(file.number, "has values that are not finite; replace or remove it")
    return np.asarray(values)


def _in_order(files: list[File]) -> list[File]:
    """Return a series' files by place along the slices' normal, else by instance number."""
    placed = all(file.facts.place is not None for file in files)
    return sorted(
        files,
        key=lambda file: (
            (file.facts.place or 0.0) if placed else 0.0,
            file.facts.instance,
            file.number,
        ),
    )


def _window(
    files: list[File], pixels: list[Array], given: tuple[float, float] | None
) -> tuple[float, float]:
    """Return the lowest and highest value of a series: as given, by its tags, or percentiles.

    The tags are those of the file in the middle, so that tissue has one grey in all slices. A
    window is meant for values before MONOCHROME1 is inverted, so it is mirrored as they are.
    """
    grey = [each.ravel() for each in pixels if each.ndim == 3]
    facts = files[len(files) // 2].facts
    given = given or facts.window
    if given is not None and facts.mirror is not None:
        given = facts.mirror - given[0], given[1]
    if given is None and not grey:
        return 0.0, 255.0  # a series of colours, which are shown as they are
    return window_of(np.concatenate(grey) if given is None else np.empty(0), given)


def _spacing(files: list[File]) -> Spacing | None:
    """Return a series' spacing where its files say it: between places, else as they say."""
    facts = files[0].facts
    if facts.pixel_mm is None:
        return None
    places = [file.facts.place for file in files if file.facts.place is not None]
    steps = np.diff(places) / 1000
    apart = float(np.median(steps[steps > 0])) if (steps > 0).any() else facts.slice_mm
    return Spacing(*facts.pixel_mm, apart)


# --------------------------------------------------------------------------- masks


def _fitting(
    found: DicomFiles, file: File, mask: NDArray[np.uint8] | None, size: tuple[int, ...]
) -> Image.Image:
    """Return the segmentation's mask, or an empty one where it has none for this frame."""
    if mask is not None and mask.shape != size:
        raise found.fault(
            file.number, f"is {size} pixels, its segmentation {mask.shape}; resample it"
        )
    return Image.fromarray(np.zeros(size, np.uint8) if mask is None else mask)


def _plain(found: DicomFiles, file: File, path: Path) -> Image.Image:
    """Return a mask's pixels as they are, without the texts that its file may carry."""
    try:
        with Image.open(path) as image:
            image.load()
            plain = image.copy()
    except Exception:  # Pillow's plugins raise many kinds for damaged bytes
        raise found.fault(file.number, "has a mask beside it that cannot be read") from None
    transparency = plain.info.get("transparency")
    plain.info = {} if transparency is None else {"transparency": transparency}
    return plain


def _read_segmentations(found: DicomFiles) -> tuple[Masks, int]:
    """Return all masks of DICOM-SEG files, segments numbered 1..K in ascending order, and K."""
    masks: Masks = {}
    for number, path in found.segmentations:
        try:
            with silence():
                _add_segmentation(masks, path)
        except Exception:  # of many kinds, and their texts may name a patient
            raise found.fault(
                number, "is a segmentation that cannot be read, or names no images; convert it"
            ) from None
    every = [mask for frames in masks.values() for mask in frames.values()]
    used = sorted({int(value) for mask in every for value in np.unique(mask)} - {0})
    numbers = np.zeros(256, np.uint8)
    numbers[used] = np.arange(1, len(used) + 1)
    return {
        uid: {k: numbers[mask] for k, mask in frames.items()} for uid, frames in masks.items()
    }, len(used)


def _add_segmentation(masks: Masks, path: Path) -> None:
    """Add a DICOM-SEG file's frames to the images that they name as their sources."""
    from pydicom import dcmread

    tags = dcmread(path)
    frames = tags.pixel_array.reshape(-1, tags.Rows, tags.Columns)
    threshold = 0
    if tags.get("SegmentationType") == "FRACTIONAL":
        threshold = int(tags.MaximumFractionalValue) // 2
    for frame, group in zip(frames, tags.PerFrameFunctionalGroupsSequence, strict=True):
        segment = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        if not 0 < segment <= 255:
            raise ValueError(segment)
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        k = int(source.get("ReferencedFrameNumber") or 1)
        own = masks.setdefault(str(source.ReferencedSOPInstanceUID), {})
        mask = own.setdefault(k, np.zeros(frame.shape, np.uint8))
        mask[frame > threshold] = segment
