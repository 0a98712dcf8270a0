"""External tests of a run, as ``samfed evaluate --data`` leaves them in ``external/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import read_json
from pipeline.errors import DataError
from pipeline.results.scores import check_summary, described

FOLDER = "external"  # in a run's folder


@dataclass(frozen=True)
class External:
    """``external/<name>.json``: one model on one folder, as ``metrics.json`` in ``test``."""

    name: str
    model: str  # global, teacher, or a client's name
    digest: str  # of the model
    data_sha256: str  # of the images and masks, by their names
    without_mask: int  # images that were left out
    unlike: float | None  # share of images unlike the training images; None for the teacher
    ece: float  # expected calibration error over all pixels, 0..1
    reliability: dict[str, list[Any]]
    test: dict[str, Any]  # ``pooled``, each site under ``clients``, and their ``client_mean``
    tolerance: dict[str, float]  # of the surface Dice, in ``px`` and ``mm``

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return dict(vars(self))

    def text(self) -> str:
        """Return the pooled scores and each site's as lines."""
        rows = {f"{self.name}, {self.model}": self.test["pooled"]}
        rows |= {f"  {site}": row for site, row in self.test["clients"].items()}
        unit = "px" if self.test["pooled"].get("hd95_mm") is None else "mm"
        lines = [f"{name}: {described(row, unit)}, {row['n']} images" for name, row in rows.items()]
        if self.unlike:
            lines.append(f"{self.unlike:.0%} of the images are unlike what it was trained on")
        return "\n".join(lines)


def read_external(run: Path) -> tuple[External, ...]:
    """Return every external test of a run, in the order of their files' names.

    Raises:
        DataError: a file is not what ``samfed evaluate --data`` writes.
    """
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            result = External(**read_json(path, stage="evaluate --data"))
            check_summary(result.test)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not the result of an external test ({error}); run `samfed evaluate "
                "--data` again"
            ) from error
        found.append(result)
    return tuple(found)
