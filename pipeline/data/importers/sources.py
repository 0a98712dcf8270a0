"""What a user gives to import, as named files, and which public data set it looks like."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.importers.archives import archive_stem, is_archive, unpack
from pipeline.data.importers.table import KINDS, pattern
from pipeline.errors import DataError
from pipeline.progress import Progress

Files = dict[str, Path]  # by name: the path below the source, whose own name comes first

_HIDDEN = re.compile(r"(?:.*/)?(?:\.[^/]+|__MACOSX|Thumbs\.db|desktop\.ini)(?:/.*)?", re.IGNORECASE)
_FOREIGN_ARCHIVE = re.compile(r".*\.(?:rar|7z|tar\.(?:bz2|xz|zst))", re.IGNORECASE)
_NESTED = 3  # archives in archives, as a repository's download of several archives

logger = logging.getLogger("samfed")


def open_source(source: Path, unpacked: Path, progress: Progress | None = None) -> Files:
    """Return the files of ``source``, a folder, an archive or a folder of archives, by name.

    Archives are unpacked below ``unpacked``, those inside of archives too. An archive beside a
    folder of its name counts as unpacked already.

    Raises:
        DataError: an archive cannot be used (``unpack``).
    """
    if source.is_file() and _FOREIGN_ARCHIVE.fullmatch(source.name):
        raise DataError(
            f"{source}: cannot be unpacked here; unpack it yourself and give the folder"
        )
    name = source.resolve().name
    files = {name: source} if source.is_file() else _walk(source, name)
    beside = 0
    for depth in range(_NESTED):
        packed = {name: path for name, path in files.items() if is_archive(path)}
        for number, (name, path) in enumerate(packed.items()):
            del files[name]
            where = name.removesuffix(path.name) + archive_stem(path)
            if any(other.lower().startswith(f"{where.lower()}/") for other in files):
                beside += 1
                continue
            folder = unpacked / f"{depth}_{number}"
            unpack(path, folder, progress=progress)
            files |= _walk(folder, where)
    if beside:
        logger.warning(
            "%d archives are not unpacked: a folder of the name lies beside each", beside
        )
    return dict(sorted(files.items()))


def _walk(folder: Path, name: str) -> Files:
    return {f"{name}/{path}": folder / path for path in sorted(_names(folder))}


def _names(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder that no system put there by itself."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        # links to folders are followed, but a link to a folder above, or a second one, is not
        identity = os.stat(where)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        for name in names:
            path = Path(where, name).relative_to(folder).as_posix()
            if not _HIDDEN.fullmatch(path):
                yield path


def recognise(folder: Path) -> str | None:
    """Return the kind whose images lie in ``folder`` as it is published, if it is one we know.

    Of several the one with most images; ``nifti`` or ``dicom`` where only the files' names tell.
    Archives are not looked into.
    """
    return recognise_files(_walk(folder, folder.resolve().name)) if folder.is_dir() else None


def recognise_files(files: Files) -> str | None:
    """Return the kind that ``recognise`` would, of files by name."""
    counts = {kind: count_signs(kind, files) for kind in KINDS}
    best = max(counts, key=lambda kind: counts[kind])
    if counts[best]:
        return best
    if any(re.search(r"\.nii(\.gz)?$", name, re.IGNORECASE) for name in files):
        return "nifti"
    if any(re.search(r"(\.dcm|\.ima|/DICOMDIR)$", name, re.IGNORECASE) for name in files):
        return "dicom"
    return None


def count_signs(kind: str, files: Files) -> int:
    """Return how many files are images of ``kind`` and have what no other kind has."""
    entry = KINDS[kind]
    sign = re.compile(entry.sign, re.IGNORECASE)
    patterns = [pattern(layout.images) for layout in entry.layouts]
    return sum(
        1 for name in files if sign.search(name) and any(each.fullmatch(name) for each in patterns)
    )
