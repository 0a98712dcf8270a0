"""DICOM files become images of 8 bits, and nothing that tells whose they are goes with them.

Files are named in messages by their number, in the order of their paths: the paths may hold names.
Errors of the libraries, which quote what a file holds, are neither shown nor chained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.importers.items import Item, Options, Spacing, pair_labels
from pipeline.data.importers.sources import Files
from pipeline.data.importers.volumes import simple_itk, to_grey, window_of
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress

_MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_SILENT = ("RTSTRUCT", "SR", "PR", "KO", "DOC", "REG", "PLAN")  # modalities without pixels

Array = NDArray[Any]
# by an image's SOPInstanceUID, and by the number (1, 2, ...) of a frame in it
Masks = dict[str, dict[int, NDArray[np.uint8]]]


class _File(NamedTuple):
    """A DICOM file: its number among the source's files, its name there, and its tags."""

    number: int
    name: str
    path: Path
    tags: Any


@dataclass
class DicomFiles:
    """The DICOM files of a source, by series, and what is not imported."""

    total: int
    series: dict[tuple[str, str], list[_File]] = field(default_factory=dict)
    segmentations: list[_File] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)  # name of the image: name of the mask
    burned_in: int = 0
    no_image: int = 0
    unknown: int = 0

    def fault(self, file: _File, what: str) -> DataError:
        """Return an error that names a file without its path."""
        return DataError(
            f"dicom: file {file.number} of {self.total}, in the order of their paths, {what}"
        )

    def left_out(self) -> dict[str, int]:
        """Return how many files of each sort are not imported."""
        return {
            "images with text burned into their pixels (BurnedInAnnotation)": self.burned_in,
            "DICOM files without an image (reports, contours, directories)": self.no_image,
            "files that are neither DICOM nor a mask beside an image": self.unknown,
        }


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what pydicom says of odd values, which it quotes, off the log and the console."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def find_dicom(files: Files, labels: str | None) -> DicomFiles:
    """Read the tags of all files, and find series, segmentations and masks beside images.

    Raises:
        ConfigError: pydicom is not installed. DataError: a file cannot be read.
    """
    try:
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise ConfigError(
            "this kind needs SimpleITK and pydicom; pip install 'samfed[medical]'"
        ) from error
    found, others = DicomFiles(len(files)), []
    for number, (name, path) in enumerate(files.items(), start=1):
        file = _File(number, name, path, None)
        try:
            with _silence():
                file = file._replace(tags=dcmread(path, stop_before_pixels=True))
                _sort_in(found, file)
        except InvalidDicomError:
            others.append(name)
        except OSError as error:
            raise found.fault(
                file, f"cannot be read ({error.strerror}); check its permissions and its disk"
            ) from None
        except Exception:
            raise found.fault(file, "is damaged; replace or remove it") from None
    masks = {name: files[name] for name in others}
    images = [file.name for each in found.series.values() for file in each]
    found.masks = pair_labels(images, masks, endings=_MASK_ENDINGS, given=labels).labels
    found.unknown = len(others) - len(set(found.masks.values()))
    return found


def _sort_in(found: DicomFiles, file: _File) -> None:
    tags = file.tags
    if tags.get("SOPClassUID") == _SEGMENTATION:
        found.segmentations.append(file)
    elif "Rows" not in tags or tags.get("Modality") in _SILENT:
        found.no_image += 1
    elif tags.get("BurnedInAnnotation") == "YES":
        found.burned_in += 1
    else:
        # data made anonymous often has the same empty PatientID everywhere
        patient = str(tags.get("PatientID") or tags.get("StudyInstanceUID") or file.name)
        series = str(tags.get("SeriesInstanceUID") or file.name)
        found.series.setdefault((patient, series), []).append(file)


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
        segmented = any(str(file.tags.get("SOPInstanceUID")) in masks for file in ordered)
        index = 0
        for file, frames in zip(ordered, pixels, strict=True):
            own = masks.get(str(file.tags.get("SOPInstanceUID")), {})
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


def _in_order(files: list[_File]) -> list[_File]:
    """Return a series' files by position along the slices' normal, else by instance number."""

    def number(file: _File) -> tuple[float, int]:
        return float(file.tags.get("InstanceNumber") or 0), file.number

    positions = [_position(file.tags) for file in files]
    if None in positions:
        return sorted(files, key=number)
    placed = zip(positions, files, strict=True)
    return [file for _, file in sorted(placed, key=lambda each: (each[0], number(each[1])))]


def _position(tags: Any) -> float | None:
    """Return how far a slice lies along its normal, in micrometres, or None if it does not say."""
    where, axes = tags.get("ImagePositionPatient"), tags.get("ImageOrientationPatient")
    if not where or not axes or len(where) != 3 or len(axes) != 6:
        return None
    normal = np.cross(np.array(axes[:3], float), np.array(axes[3:], float))
    return float(np.rint(normal @ np.array(where, float) * 1000))


def _decode(found: DicomFiles, file: _File) -> Array:
    """Return a file's frames: (N, H, W) rescaled values, MONOCHROME1 inverted, or RGB uint8."""
    sitk = simple_itk()
    try:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(file.path)))
    except RuntimeError:
        raise found.fault(file, "cannot be decoded; convert or remove it") from None
    if values.ndim == 2 or (values.ndim == 3 and values.shape[:2] == _size(file)):
        values = values[None]
    grey = values.ndim == 3
    if not grey and (values.shape[-1] != 3 or values.dtype != np.uint8):
        raise found.fault(file, "has colours of more than 8 bits; convert or remove it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise found.fault(file, "has values that are not finite; replace or remove it")
    return np.asarray(values)


def _size(file: _File) -> tuple[int, int]:
    return int(file.tags.Rows), int(file.tags.Columns)


def _window(
    files: list[_File], pixels: list[Array], given: tuple[float, float] | None
) -> tuple[float, float]:
    """Return the lowest and highest value of a series: as given, by its tags, or percentiles.

    The tags are those of the file in the middle, so that tissue has one grey in all slices. A
    window is meant for values before MONOCHROME1 is inverted, so it is mirrored as they are.
    """
    grey = [each.ravel() for each in pixels if each.ndim == 3]
    if not grey:
        return 0.0, 255.0
    tags = files[len(files) // 2].tags
    with _silence():
        centre, width = (_number(tags, key) for key in ("WindowCenter", "WindowWidth"))
    if given is None and centre is not None and width is not None and width >= 1:
        given = centre, width
    if given is not None and tags.get("PhotometricInterpretation") == "MONOCHROME1":
        slope, intercept = _number(tags, "RescaleSlope"), _number(tags, "RescaleIntercept")
        highest = 2 ** int(tags.BitsStored) - 1
        slope = 1.0 if slope is None else slope
        given = slope * highest + 2 * (intercept or 0.0) - given[0], given[1]
    return window_of(np.concatenate(grey) if given is None else grey[0], given)


def _number(tags: Any, key: str) -> float | None:
    """Return the first number of a tag, or None."""
    value = tags.get(key)
    try:
        return float(value if isinstance(value, (str, float, int)) else value[0])
    except (TypeError, ValueError, IndexError):
        return None


def _spacing(files: list[_File]) -> Spacing | None:
    """Return a series' spacing where its files say it, in the patient and not on the detector."""
    tags = files[0].tags
    measures = _first(_first(tags, "SharedFunctionalGroupsSequence"), "PixelMeasuresSequence")
    both = tags.get("PixelSpacing") or (measures or {}).get("PixelSpacing")
    if not both or len(both) != 2:
        return None
    positions = [_position(file.tags) for file in files]
    steps = np.diff([each for each in positions if each is not None]) / 1000
    between = float(np.median(steps[steps > 0])) if (steps > 0).any() else None
    thickness = (_number(each, "SliceThickness") for each in (tags, measures or {}))
    apart = _number(tags, "SpacingBetweenSlices")
    known = [each for each in (between, apart, *thickness) if each is not None]
    return Spacing(float(both[0]), float(both[1]), known[0] if known else None)


def _first(tags: Any, sequence: str) -> Any:
    """Return the first item of a sequence, or None where there is none."""
    return next(iter((tags or {}).get(sequence) or ()), None)


# --------------------------------------------------------------------------- masks


def _fitting(
    found: DicomFiles, file: _File, mask: NDArray[np.uint8] | None, size: tuple[int, ...]
) -> Image.Image:
    """Return the segmentation's mask, or an empty one where it has none for this frame."""
    if mask is not None and mask.shape != size:
        raise found.fault(file, f"is {size} pixels, its segmentation {mask.shape}; resample it")
    return Image.fromarray(np.zeros(size, np.uint8) if mask is None else mask)


def _plain(found: DicomFiles, file: _File, path: Path) -> Image.Image:
    """Return a mask's pixels as they are, without the texts that its file may carry."""
    try:
        with Image.open(path) as image:
            image.load()
            plain = image.copy()
    except Exception:  # Pillow's plugins raise many kinds for damaged bytes
        raise found.fault(file, "has a mask beside it that cannot be read") from None
    transparency = plain.info.get("transparency")
    plain.info = {} if transparency is None else {"transparency": transparency}
    return plain


def _read_segmentations(found: DicomFiles) -> tuple[Masks, int]:
    """Return all masks of DICOM-SEG files, segments numbered 1..K in ascending order, and K."""
    masks: Masks = {}
    for file in found.segmentations:
        try:
            with _silence():
                _add_segmentation(masks, file.path)
        except Exception:
            raise found.fault(
                file, "is a segmentation that cannot be read, or names no images; convert it"
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
