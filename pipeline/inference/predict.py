"""``samfed predict``: masks of new images, in batches, each finished one written down at once."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.reading import map_ahead
from pipeline.disk import file_sha256, to_json, write_bytes, writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.inference.inputs import Picture, Source, Unreadable, find, read
from pipeline.inference.model import Model
from pipeline.inference.outputs import Prediction, Row, Wanted, table, write_prediction
from pipeline.progress import Progress

JOURNAL = "predictions.jsonl"
TABLE = "predictions.csv"


@dataclass(frozen=True)
class Predicted:
    """What ``predict`` did; its failures are the files that could not be read."""

    out: Path
    computed: int
    kept: int  # finished by an earlier call
    unlike: tuple[str, ...]  # names of files unlike the training images
    unreadable: tuple[str, ...]  # a line each

    def failures(self) -> list[str]:
        """Return a line for each file that could not be read: exit code 6."""
        return list(self.unreadable)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**vars(self), "out": str(self.out)}

    def text(self) -> str:
        """Return what ``samfed predict`` prints."""
        kept = f", {self.kept} were finished before" if self.kept else ""
        lines = [f"{self.computed} predicted{kept}; {self.out / TABLE}"]
        if self.unlike:
            count, every = len(self.unlike), self.computed + self.kept
            lines.append(
                f"{count} of {every} are unlike what this model was trained on, e.g. "
                f"{self.unlike[0]}: do not trust their masks (column `unlike`)"
            )
        return "\n".join(lines)


def predict(
    model: Model,
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Predicted:
    """Predict files and all files in folders into ``wanted.out``; finished ones stay as they are.

    Raises:
        DataError: there is nothing to predict, or two files would have outputs of one name.
        ConfigError: the folder holds predictions of another model, or with other options.
        LockedStoreError: another process writes there.
    """
    sources = find(paths, leave_out=wanted.out)
    with writer_lock(wanted.out / ".predict.lock"), closing(Journal(model, wanted)) as journal:
        todo = [source for source in sources if not journal.has(source)]
        unreadable: dict[str, str] = {}
        read_ahead = map_ahead(lambda source: read(source, model), todo)
        for done, found in enumerate(_predicted(model, read_ahead, batch_size), start=1):
            if isinstance(found, Unreadable):
                unreadable[found.source.name] = found.reason
            else:
                rows = write_prediction(found, wanted, model)
                journal.add(found.picture, rows)
            if progress is not None:
                progress("predicting", done, len(todo))
        finished = [
            row for each in sources if each.name not in unreadable for row in journal.rows(each)
        ]
        write_bytes(wanted.out / TABLE, _csv(finished).encode())
    kept = len(sources) - len(todo)
    unlike = tuple(dict.fromkeys(row["file"] for row in finished if row["unlike"]))
    return Predicted(
        wanted.out, len(todo) - len(unreadable), kept, unlike, tuple(unreadable.values())
    )


def _predicted(
    model: Model, found: Iterable[Picture | Unreadable], batch_size: int
) -> Iterator[Prediction | Unreadable]:
    """Predict pictures together until their slices fill a batch."""
    waiting: list[Picture] = []
    for each in found:
        if isinstance(each, Unreadable):
            yield each
            continue
        waiting.append(each)
        if sum(len(picture.frames) for picture in waiting) >= batch_size:
            yield from _together(model, waiting, batch_size)
            waiting = []
    if waiting:
        yield from _together(model, waiting, batch_size)


def _together(model: Model, pictures: Sequence[Picture], batch_size: int) -> Iterator[Prediction]:
    frames = [frame for picture in pictures for frame in picture.frames]
    outputs = [
        model.predict(frames[start : start + batch_size])
        for start in range(0, len(frames), batch_size)
    ]
    probabilities = np.concatenate([each.probabilities for each in outputs])
    known = [each.distances for each in outputs if each.distances is not None]
    distances = np.concatenate(known) if known else None
    start = 0
    for picture in pictures:
        rows = slice(start, start + len(picture.frames))
        start = rows.stop
        yield Prediction(
            picture, probabilities[rows], None if distances is None else distances[rows]
        )


class Journal:
    """``predictions.jsonl``: what made the predictions, then a line for each finished file."""

    def __init__(self, model: Model, wanted: Wanted) -> None:
        """Read what is finished, a line cut off by a kill left out, and open it for more.

        Raises:
            ConfigError: it is another model's, or was made with other options.
        """
        self._wanted, self._num_classes = wanted, model.num_classes
        self._path = wanted.out / JOURNAL
        head = {
            "model": model.digest,
            "format": wanted.format,
            "probabilities": wanted.probabilities,
            "overlays": wanted.overlays,
        }
        lines = _lines(self._path)
        for key, value in head.items() if lines else ():
            if lines[0].get(key) != value:
                raise ConfigError(
                    f"{wanted.out}: holds predictions with {key} {lines[0].get(key)}, this call "
                    f"has {value}; give another --out"
                )
        self._found: dict[str, dict[str, Any]] = {line["name"]: line for line in lines[1:]}
        whole = [head, *self._found.values()]
        write_bytes(self._path, "".join(to_json(line) + "\n" for line in whole).encode())
        self._file = self._path.open("ab")

    def has(self, source: Source) -> bool:
        """Tell whether this very file is finished, and its outputs are still there."""
        found = self._found.get(source.name)
        if found is None or not source.path.is_file():
            return False
        files = self._wanted.files(source, self._num_classes).values()
        try:
            same = found["sha256"] == file_sha256(source.path)
        except OSError:  # it is named as unreadable when it is read
            return False
        return same and all(file.is_file() for file in files)

    def add(self, picture: Picture, rows: list[Row]) -> None:
        """Write down, durably, that a file's outputs are all written."""
        line = {"name": picture.source.name, "sha256": picture.sha256, "rows": rows}
        self._file.write(to_json(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._found[picture.source.name] = line

    def rows(self, source: Source) -> list[Row]:
        """Return a file's rows of the table; none where it could not be read."""
        found = self._found.get(source.name)
        rows: list[Row] = [] if found is None else found["rows"]
        return rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; the last one may be cut off."""
    found: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}: damaged at line {number}; remove the folder, or give another --out"
                ) from error
    return found


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table(rows))
    return out.getvalue()
