"""Finished runs as this room reads them: settings, history, and what ``samfed evaluate`` found."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.disk import is_folder_name, read_json
from pipeline.errors import ConfigError, DataError, StageError
from pipeline.federation.runs import RunFolder
from pipeline.results.external import External, read_external
from pipeline.results.gallery import FILE as GALLERY_FILE
from pipeline.results.gallery import GalleryImage, load_gallery
from pipeline.results.scores import check_summary, described
from pipeline.segmentation.metrics import CLASS_SCORES
from pipeline.segmentation.model_spec import ModelSpec

FALL = 0.05  # of validation Dice below its best round that is a warning
FORMAT = 2  # of metrics.json and the tables beside it
SCORES = CLASS_SCORES  # columns of ``FinishedRun.scores``; those in mm may not be known

ImageKey = tuple[str, str, str]  # client, image id and group


@dataclass(frozen=True)
class Evaluation:
    """``metrics.json``: scores of a run's final models on every client's test images."""

    method: str
    seed: int
    rounds: int
    test: dict[str, Any]  # ``pooled`` over images, ``clients`` by name, and their ``client_mean``
    tolerance: dict[str, float]  # of the surface Dice, in ``px`` and ``mm``
    data: dict[str, Any]  # by owner: ``splits``, ``groups``, ``masks``, ``sites``
    teacher: dict[str, Any] | None  # what is known of it; None where the method uses none
    format: int = FORMAT

    def warnings(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what to doubt about the scores, a line each; ``history`` is the run's."""
        found = []
        if (fall := _fall(history)) is not None:
            found.append(fall)
        tested = self.test["clients"]
        single = [name for name, row in tested.items() if row["dice_ci95"] is None]
        if single:
            found.append(
                f"tested on one image or patient, so without an interval: {', '.join(single)}"
            )
        untested = [name for name in self.data if name not in ("server", *tested)]
        if tested and untested:
            found.append(f"without test images, so without scores: {', '.join(untested)}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return dict(vars(self))

    def text(self) -> str:
        """Return the pooled scores as one line."""
        row = self.test["pooled"]
        if not row["n"]:
            return f"{self.method}: no test images, so no scores"
        unit = "px" if row.get("hd95_mm") is None else "mm"
        lines = [f"{self.method}: {described(row, unit)}, {row['n']} images"]
        classes = row["classes"] if len(row["classes"]) > 1 else {}
        for name, of in classes.items():
            scores = described(of, unit) if of["n"] else "in no truth and no prediction"
            lines.append(f"  {name}: {scores}, {of['n']} images")
        return "\n".join(lines)


def _fall(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Say that the last round's validation Dice lies well below an earlier round's; else None."""
    dice = {entry["round"]: entry["val"].get("dice") for entry in history}
    known = {number: value for number, value in dice.items() if value is not None}
    if not known:
        return None
    best, last = max(known, key=lambda number: known[number]), max(known)
    if known[best] - known[last] <= FALL:
        return None
    return (
        f"validation Dice fell from {known[best]:.3f} in round {best} to {known[last]:.3f} in "
        f"round {last}: the rounds unlearn; doubt the labels, or lower federate.learning_rate"
    )


@dataclass(frozen=True)
class FinishedRun:
    """An evaluated run, as :func:`read_run` found it."""

    name: str
    config: Config  # as used
    clients: tuple[str, ...]  # sorted, as far as they are known, those that never took part too
    history: list[dict[str, Any]]  # an entry each round
    evaluation: Evaluation
    partition: str  # sha256 of the partition.json that it was made on
    images: tuple[ImageKey, ...]  # of the test parts, sorted
    scores: NDArray[np.float64]  # (N, 8): ``SCORES``, nan where not known, as ``images``
    external: tuple[External, ...] = ()  # tests on other folders
    gallery: tuple[GalleryImage, ...] = ()  # some of the test images
    models: Mapping[str, ModelSpec] = field(default_factory=dict)  # ``global``, or by client


def run_folder(config: Config, name: str | None = None) -> RunFolder:
    """Return the folder of the run ``name``, or of the one that the settings name."""
    if name is not None and not is_folder_name(name):
        raise ConfigError(f"run {name!r}: expected the name of a folder under cache/runs")
    return RunFolder(config.cache.root / "runs" / (name or config.federate.name))


def read_run(run: RunFolder, *, scores: Path | None = None) -> FinishedRun:
    """Read what ``samfed federate`` and ``samfed evaluate`` wrote of one run.

    Args:
        scores: the ``out`` that it was evaluated with; None for the run's own folder.

    Raises:
        StageError: the run is not trained, or not evaluated, yet. ConfigError: its parameters are
        not what this version knows. DataError: a file is not what samfed writes.
    """
    config, history = run.config(), run.history()
    if not history:
        raise StageError(
            f"{run.path / 'history.jsonl'}: holds no round yet; run `samfed federate` first"
        )
    folder = run.path if scores is None else scores / run.path.name
    evaluation = _read_evaluation(folder / "metrics.json")
    path = folder / "per_image.csv"
    table = _read_scores(path)
    values = np.array([table[image] for image in sorted(table)], dtype=np.float64)
    values = values.reshape(-1, len(SCORES))
    pooled = evaluation.test["pooled"]
    wrong = len(values) and abs(pooled["dice"] - values[:, 0].mean()) >= 1e-5
    if pooled["n"] != len(values) or wrong:
        # a file cut short, or left by a killed evaluation
        raise DataError(f"{path}: not the images of metrics.json; run `samfed evaluate` again")
    own = [path.name for path in run.path.glob("clients/*")]
    took_part = [name for entry in history for name in entry["clients"]]
    return FinishedRun(
        name=run.path.name,
        config=config,
        clients=tuple(sorted({*own, *took_part, *evaluation.test["clients"]})),
        history=history,
        evaluation=evaluation,
        partition=run.partition_sha256(),
        images=tuple(sorted(table)),
        scores=values,
        external=read_external(run.path),
        gallery=tuple(load_gallery(folder / GALLERY_FILE)),
        models=_models(run),
    )


def _models(run: RunFolder) -> dict[str, ModelSpec]:
    """Return what is known of the final models; of runs of an older samfed nothing is."""
    shared = {"global": None} if run.model_path.with_suffix(".json").is_file() else {}
    own = {path.parent.name: path.parent.name for path in run.path.glob("clients/*/model.json")}
    return {name: run.spec(client) for name, client in sorted((shared or own).items())}


def _read_evaluation(path: Path) -> Evaluation:
    metrics = read_json(path, stage="evaluate")
    if not isinstance(metrics, dict) or metrics.get("format") != FORMAT:
        fault = f"format {metrics.get('format', 1)}" if isinstance(metrics, dict) else "no table"
        expected = f"this samfed reads format {FORMAT}"
        raise DataError(f"{path}: {fault}, {expected}; run `samfed evaluate` again")
    try:
        found = Evaluation(**metrics)
        check_summary(found.test)
        found.tolerance["px"], found.tolerance["mm"]
        for of in found.data.values():
            of["splits"]["train"], of["masks"], of["groups"], ", ".join(of["sites"])
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"no method and test metrics in it ({error})"
        raise DataError(f"{path}: {fault}; run `samfed evaluate` again") from error
    return found


def _read_scores(path: Path) -> dict[ImageKey, list[float]]:
    """Read ``SCORES`` by client, image id and group."""
    if not path.is_file():
        raise StageError(f"{path}: not found; run `samfed evaluate` first")
    table: dict[ImageKey, list[float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                image = (line["client"], line["image_id"], line["group"])
                values = [float(line[name]) for name in SCORES]
                if image in table or not all(map(math.isfinite, values[:5])):
                    raise ValueError(f"{image[1]} is there twice or has no score")
                table[image] = values
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: not the scores of images ({error}); run `samfed evaluate` again"
        ) from error
    return table
