"""NIfTI volumes become upright slices of 8 bits, with their labels as class indices."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.importers.items import Item, Options, Spacing, pair_labels
from pipeline.data.importers.sources import Files
from pipeline.disk import write_bytes
from pipeline.errors import ConfigError, DataError, first_line
from pipeline.progress import Progress

PERCENTILES = (0.5, 99.5)
PLANES = ("axial", "coronal", "sagittal")  # in the order of an array's axes z, y, x
MAX_CLASSES = 255
_BLOCK = 2**20
_ENDINGS = (".nii.gz", ".nii")
_PATIENT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", re.IGNORECASE)  # as BIDS names them
_NO_PATIENT = re.compile(
    r"(images?|labels?|masks?|volumes?|data|nifti|train(ing)?|test(ing)?|val(idation)?)(tr|ts|val)?",
    re.IGNORECASE,
)

Array = NDArray[Any]


class Case(NamedTuple):
    """A volume and its labels, and what its slices are called."""

    image: Path
    labels: Path | None
    name: str
    site: str
    group: str


class Volume(NamedTuple):
    """Values (Z, Y, X) with z to the head, y to the back, x to the left, and mm along each."""

    values: Array
    spacing: tuple[float, float, float]


def simple_itk() -> Any:
    """Import SimpleITK, which only these kinds need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            "this kind needs SimpleITK and pydicom; pip install 'samfed[medical]'"
        ) from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_volume(path: Path) -> Volume:
    """Read a NIfTI file in canonical orientation, whatever order it is stored in; NaN becomes 0.

    Raises:
        DataError: it is damaged, or has not three dimensions.
    """
    sitk = simple_itk()
    with path.open("rb"):  # what cannot be read is an OSError, and is not called damaged
        pass
    try:
        image = sitk.ReadImage(str(path))
        dimensions, channels = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
        _check_whole(path, image)
        if dimensions == 3 and channels == 1:
            image = sitk.DICOMOrient(image, "LPS")
    except RuntimeError as error:
        reason = " ".join(str(error).split("ITK ERROR: ")[-1].split()) or first_line(error)
        raise DataError(f"{path}: not a NIfTI volume that can be read ({reason})") from error
    if dimensions != 3 or channels != 1:
        raise DataError(
            f"{path}: has {dimensions} dimensions and {channels} values a voxel, expected 3 and 1; "
            "split it into volumes first"
        )
    x, y, z = image.GetSpacing()
    return Volume(sitk.GetArrayFromImage(image), (z, y, x))


def write_like(path: Path, values: Array, out: Path) -> None:
    """Write values (Z, Y, X), as ``read_volume`` gives them, as NIfTI on the grid of ``path``.

    Atomically. The file has the order, spacing, origin and directions of the original.
    """
    sitk = simple_itk()
    original = sitk.ReadImage(str(path))
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(original.GetDirection())
    volume = sitk.GetImageFromArray(values)
    volume.CopyInformation(sitk.DICOMOrient(original, "LPS"))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "volume.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(volume, code), str(file))
        write_bytes(out, file.read_bytes())


def slicing_axis(volume: Volume) -> int:
    """Return the axis along which slices lie farthest apart; the axial one where all are equal."""
    return int(np.argmax(volume.spacing))


def _check_whole(path: Path, image: Any) -> None:
    """Refuse a file that was cut off or changed, which the NIfTI library fills with zeros."""
    expected = int(float(image.GetMetaData("vox_offset"))) + (
        prod(image.GetSize())
        * image.GetNumberOfComponentsPerPixel()
        * (int(image.GetMetaData("bitpix")) // 8)
    )
    size = path.stat().st_size
    if path.suffix.lower() == ".gz":
        size = 0
        try:
            with gzip.open(path) as file:
                while block := file.read(_BLOCK):
                    size += len(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged ({first_line(error)}); get it again") from error
    if size < expected:
        raise DataError(f"{path}: damaged: {size} bytes, expected {expected}; get it again")


def window_of(values: Array, given: tuple[float, float] | None) -> tuple[float, float]:
    """Return the lowest and highest value shown: of a centre and width, or of the percentiles."""
    if given is not None:
        return given[0] - given[1] / 2, given[0] + given[1] / 2
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def to_grey(values: Array, window: tuple[float, float]) -> Image.Image:
    """Return values (H, W) as a grey image of 8 bits: ``window`` becomes 0..255.

    Not 16 bits: readers stretch a deeper image from its own minimum to its own maximum, and each
    slice of a volume would have another grey for the same tissue.
    """
    low, high = window
    scaled = (values.astype(np.float64) - low) * (255 / (high - low)) if high > low else values * 0
    return Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))


def upright(values: Array, axis: int, index: int) -> Array:
    """Return a slice (H, W) of (Z, Y, X) as it is read: front or head up, patient's right left."""
    chosen: Array = np.take(values, index, axis=axis)
    return chosen if axis == 0 else chosen[::-1]


@dataclass(frozen=True)
class ClassTable:
    """Which class (1..K) each value of the label volumes is; 0 is background."""

    values: tuple[int, ...]

    def apply(self, labels: Array, path: Path) -> NDArray[np.uint8]:
        """Return class indices of the same shape.

        Raises:
            DataError: there is another value.
        """
        found = [int(value) for value in np.unique(labels) if value != 0]
        odd = sorted(set(found) - set(self.values))
        if odd:
            raise DataError(f"{path}: found label {odd[0]}, expected {(0, *self.values)}")
        classes = np.zeros(labels.shape, dtype=np.uint8)
        for number, value in enumerate(self.values, start=1):
            classes[labels == value] = number
        return classes


def class_table(cases: Iterable[Case]) -> ClassTable:
    """Give numbers to the values that all label volumes have, in ascending order.

    Raises:
        DataError: one holds fractions, negative values, or more than 255 values.
    """
    found: set[float] = set()
    for case in cases:
        if case.labels is None:
            continue
        values = np.unique(read_volume(case.labels).values)
        if len(values) > MAX_CLASSES + 1 or (values < 0).any() or (values != np.rint(values)).any():
            raise DataError(
                f"{case.labels}: {len(values)} values from {values[0]} to {values[-1]}; expected "
                "labels 0, 1, 2, ...; say with --labels which files are labels"
            )
        found |= set(values.tolist())
    return ClassTable(tuple(sorted(int(value) for value in found - {0})) or (1,))


def read_slices(
    cases: list[Case], classes: ClassTable, options: Options, progress: Progress
) -> Iterator[Item]:
    """Yield every slice of every volume, along the plane asked for or acquired.

    Raises:
        DataError: a volume cannot be used, or its labels have another size or other values.
    """
    for number, case in enumerate(cases, start=1):
        yield from _slices(case, classes, options)
        progress("slicing volumes", number, len(cases))


def _slices(case: Case, classes: ClassTable, options: Options) -> Iterator[Item]:
    volume, labels = read_volume(case.image), None
    if case.labels is not None:
        truth = read_volume(case.labels)
        if truth.values.shape != volume.values.shape or not np.allclose(
            truth.spacing, volume.spacing, rtol=1e-2
        ):
            raise DataError(
                f"{case.labels}: {truth.values.shape} voxels of {truth.spacing} mm, its image has "
                f"{volume.values.shape} of {volume.spacing}; resample the labels to the image"
            )
        labels = classes.apply(truth.values, case.labels)
    axis = PLANES.index(options.axis) if options.axis else slicing_axis(volume)
    rows, columns = (mm for each, mm in enumerate(volume.spacing) if each != axis)
    window = window_of(volume.values, options.window)
    for index in range(volume.values.shape[axis]):
        mask = None if labels is None else upright(labels, axis, index)
        yield Item(
            f"{case.name}_i{index + 1:03d}",
            to_grey(upright(volume.values, axis, index), window),
            None if mask is None else Image.fromarray(np.ascontiguousarray(mask)),
            case.site,
            case.group,
            Spacing(rows, columns, volume.spacing[axis]),
        )


class NiftiFiles(NamedTuple):
    """The volumes of a source, and label volumes that no image has."""

    cases: list[Case]
    orphans: list[str]


def find_nifti(files: Files, labels: str | None) -> NiftiFiles:
    """Find volumes, their labels and their patients among ``files``.

    Patients, and volumes within each, are numbered in the order of the files' names, so that no
    name reaches an id.
    """
    names = [name for name in files if name.lower().endswith(_ENDINGS)]
    found = pair_labels(names, files, endings=_ENDINGS, given=labels)
    left_out = {*found.labels.values(), *found.orphans}
    images = [name for name in names if name not in left_out]
    numbers: dict[str, int] = {}
    volumes: dict[str, int] = {}
    cases = []
    for name, patient in zip(images, _patients(images), strict=True):
        number = numbers.setdefault(patient, len(numbers) + 1)
        volumes[patient] = volumes.get(patient, 0) + 1
        label = found.labels.get(name)
        group = f"p{number:04d}"
        case_name = f"{group}_s{volumes[patient]:02d}"
        truth = None if label is None else files[label]
        cases.append(Case(files[name], truth, case_name, "nifti", group))
    return NiftiFiles(cases, found.orphans)


def _patients(images: list[str]) -> list[str]:
    """Return a patient for each image: BIDS's subject, else a folder, else the image itself.

    The folder is the first that not all images share and that is not named as images or training
    are, so that a patient's studies stay together.
    """
    folders = [name.split("/")[:-1] for name in images]
    shared = 0
    while folders and all(len(each) > shared for each in folders):
        if len({each[shared] for each in folders}) > 1:
            break
        shared += 1
    patients = []
    for name, parts in zip(images, folders, strict=True):
        subject = _PATIENT.search(name)
        own = [each for each in parts[shared:] if not _NO_PATIENT.fullmatch(each)]
        patients.append(subject[1] if subject else own[0] if own else name)
    return patients
