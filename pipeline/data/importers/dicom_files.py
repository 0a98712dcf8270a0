"""DICOM files by series, as the few facts of their tags that an import needs and may keep.

Files are named in messages by their number, in the order of their paths: the paths may hold names.
Errors and warnings of pydicom, which quote what a file holds, are neither shown nor chained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.importers.items import pair_labels
from pipeline.data.importers.sources import Files
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress

_MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


class Facts(NamedTuple):
    """What an import needs of a file's tags.

    Attributes:
        patient, series: what tells one from another; they only ever lead to a number.
        uid: the SOPInstanceUID, which segmentations refer to.
        place: micrometres along the slices' normal, if it is known.
        instance: the number in its series.
        pixel_mm: millimetres between rows and between columns, in the patient.
        slice_mm: millimetres between slices, or their thickness.
        window: centre and width of the values shown, before MONOCHROME1 is inverted.
        mirror: what a stored value and its inverted one add up to in MONOCHROME1, else None.
    """

    patient: str
    series: str
    uid: str
    place: float | None
    instance: float
    pixel_mm: tuple[float, float] | None
    slice_mm: float | None
    window: tuple[float, float] | None
    mirror: float | None


class File(NamedTuple):
    """A DICOM file: its number among the source's files, its name there, and its facts."""

    number: int
    name: str
    path: Path
    facts: Facts


@dataclass
class DicomFiles:
    """The DICOM files of a source, by series, and what is not imported."""

    total: int
    series: dict[tuple[str, str], list[File]] = field(default_factory=dict)
    segmentations: list[tuple[int, Path]] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)  # name of the image: name of the mask
    burned_in: int = 0
    no_image: int = 0
    unknown: int = 0

    def fault(self, number: int, what: str) -> DataError:
        """Return an error that names a file without its path."""
        return DataError(
            f"dicom: file {number} of {self.total}, in the order of their paths, {what}"
        )

    def left_out(self) -> dict[str, int]:
        """Return how many files of each sort are not imported."""
        return {
            "images with text burned into their pixels (BurnedInAnnotation)": self.burned_in,
            "DICOM files without an image (reports, contours, directories)": self.no_image,
            "files that are neither DICOM nor a mask beside an image": self.unknown,
        }


@contextmanager
def silence() -> Iterator[None]:
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


def find_dicom(files: Files, labels: str | None, progress: Progress) -> DicomFiles:
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
        try:
            with silence():
                _sort_in(found, dcmread(path, stop_before_pixels=True), number, name, path)
        except InvalidDicomError:
            others.append(name)
        except OSError as error:
            raise found.fault(
                number, f"cannot be read ({error.strerror}); check its permissions and its disk"
            ) from None
        except Exception:  # pydicom raises many kinds for damaged bytes
            raise found.fault(number, "is damaged; replace or remove it") from None
        progress("reading tags", number, len(files))
    masks = {name: files[name] for name in others}
    images = [file.name for each in found.series.values() for file in each]
    try:
        found.masks = pair_labels(images, masks, endings=_MASK_ENDINGS, given=labels).labels
    except DataError:
        raise DataError("dicom: an image has two masks; say which with --labels") from None
    found.unknown = len(others) - len(set(found.masks.values()))
    return found


def _sort_in(found: DicomFiles, tags: Any, number: int, name: str, path: Path) -> None:
    from pydicom.uid import UID

    sort = UID(tags.get("SOPClassUID") or tags.file_meta.MediaStorageSOPClassUID)
    if sort == _SEGMENTATION:
        found.segmentations.append((number, path))
    elif not sort.name.endswith("Image Storage") and "Rows" not in tags:
        found.no_image += 1
    elif tags.get("BurnedInAnnotation") == "YES":
        found.burned_in += 1
    else:
        if "Columns" not in tags:  # cut off before the pixels
            raise ValueError(number)
        file = File(number, name, path, _facts(tags, name))
        found.series.setdefault((file.facts.patient, file.facts.series), []).append(file)


def _facts(tags: Any, name: str) -> Facts:
    shared = _first(tags, "SharedFunctionalGroupsSequence")
    measures = _first(shared, "PixelMeasuresSequence") or {}
    pixel = _numbers(tags, "PixelSpacing") or _numbers(measures, "PixelSpacing")
    apart = (
        _numbers(tags, "SpacingBetweenSlices")
        or _numbers(tags, "SliceThickness")
        or _numbers(measures, "SliceThickness")
    )
    centre, width = _numbers(tags, "WindowCenter"), _numbers(tags, "WindowWidth")
    mirror = None
    if tags.get("PhotometricInterpretation") == "MONOCHROME1":
        slope = (_numbers(tags, "RescaleSlope") or [1.0])[0]
        intercept = (_numbers(tags, "RescaleIntercept") or [0.0])[0]
        mirror = slope * (2 ** int(tags.BitsStored) - 1) + 2 * intercept
    return Facts(
        # data made anonymous often has the same empty PatientID everywhere
        patient=str(tags.get("PatientID") or tags.get("StudyInstanceUID") or name),
        series=str(tags.get("SeriesInstanceUID") or name),
        uid=str(tags.get("SOPInstanceUID")),
        place=_place(tags),
        instance=(_numbers(tags, "InstanceNumber") or [0.0])[0],
        pixel_mm=(pixel[0], pixel[1]) if len(pixel) == 2 else None,
        slice_mm=apart[0] if apart else None,
        window=(centre[0], width[0]) if centre and width and width[0] >= 1 else None,
        mirror=mirror,
    )


def _place(tags: Any) -> float | None:
    where, axes = _numbers(tags, "ImagePositionPatient"), _numbers(tags, "ImageOrientationPatient")
    if len(where) != 3 or len(axes) != 6:
        return None
    return float(np.rint(np.cross(axes[:3], axes[3:]) @ np.array(where) * 1000))


def _numbers(tags: Any, key: str) -> list[float]:
    """Return the numbers of a tag; none where it is not there or holds something else."""
    try:
        value = tags.get(key)
        values = [] if value is None else [value] if isinstance(value, (str, float, int)) else value
        numbers = [float(each) for each in values]
    except (TypeError, ValueError, OverflowError):
        return []
    return numbers if all(map(isfinite, numbers)) else []


def _first(tags: Any, sequence: str) -> Any:
    """Return the first item of a sequence, or None where there is none."""
    return next(iter((tags or {}).get(sequence) or ()), None)
