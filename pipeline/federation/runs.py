"""A run's folder, ``cache/runs/<name>/``: parameters, history, checkpoints, models, examples.

``params.yaml`` as used, ``history.jsonl`` (one line a round), the last two of
``checkpoints/round_NNNN.safetensors``, and when the run is complete ``models/global.safetensors``,
or ``clients/<client>/model.safetensors`` where clients have networks of their own, a spec beside
each (``.json``), and ``examples.safetensors``. What lies in ``clients/<client>/`` and a client's
own model are written and read by that client alone. ``metrics.json`` comes from ``samfed evaluate``
and ``report.html`` from ``samfed report``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.disk import file_sha256, to_json, write_bytes
from pipeline.errors import ConfigError, CorruptStoreError, DataError, IdentityError, StageError
from pipeline.federation.examples import Example, load_examples, save_examples
from pipeline.federation.weight_average import WeightAverage
from pipeline.folders import move, unused_name
from pipeline.params import load_config
from pipeline.segmentation.model_spec import ModelSpec, read_spec
from pipeline.stores.plain_data import Plain, State, load, save

EXAMPLES = "examples.safetensors"

log = logging.getLogger("samfed.runs")
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Checkpoint(Plain):
    """Everything that the server's next round depends on."""

    round: int
    weights: State  # of the server's model: the global one, where clients share it
    client_rounds: dict[str, int]  # of whom took part: the round whose private state counts
    partition: str  # sha256 of the partition.json that the run was made on
    fingerprint: str  # of all that decides the run's result
    moments: dict[str, State] = field(default_factory=dict)  # of the server's optimiser
    average: WeightAverage = field(default_factory=WeightAverage)  # of shared weights, last rounds

    def address(self, client: str, number: int) -> dict[str, Any]:
        """Return what a request of round ``number`` to ``client`` says that builds on this one."""
        state_round = self.client_rounds.get(client, 0)
        return {"client": client, "round_number": number, "state_round": state_round}


class RoundFiles:
    """Plain data by round in a folder, ``<stem>_NNNN.safetensors``; old rounds are dropped."""

    def __init__(self, folder: Path, *, kept: int, stem: str = "round") -> None:
        self._folder, self._kept, self._stem = folder, kept, stem

    def path(self, number: int) -> Path:
        """Return the file of round ``number``."""
        return self._folder / f"{self._stem}_{number:04d}.safetensors"

    def last(self) -> Path | None:
        """Return the file of the last round, or None."""
        saved = self._saved()
        return saved[max(saved)] if saved else None

    def save(self, number: int, value: Any, *, before: int) -> None:
        """Write a round's data atomically, and drop what no repeated round can ask for.

        Kept are the round, the one ``before`` that it builds on, and so many before that as make
        ``kept``. Later rounds are kept too: a client that was given up may write an old one late.
        """
        save(self.path(number), value)
        saved = self._saved()
        older = sorted(each for each in saved if each <= before)
        for each in saved.keys() - {*older[1 - self._kept :]}:
            if each < number:
                saved[each].unlink(missing_ok=True)

    def drop_after(self, number: int) -> None:
        """Drop later rounds, from which a run that begins again would resume."""
        for each, path in self._saved().items():
            if each > number:
                path.unlink()

    def _saved(self) -> dict[int, Path]:
        """Return the files by their rounds, of any number of digits."""
        paths = self._folder.glob(f"{self._stem}_*.safetensors")
        return {int(path.stem.split("_")[1]): path for path in paths}


class RunFolder:
    """Reads and writes one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = RoundFiles(path / "checkpoints", kept=_KEPT_CHECKPOINTS)

    @property
    def model_path(self) -> Path:
        """The file of the final global model."""
        return self._model(None)

    def weights_path(self, client: str | None = None) -> Path:
        """Return the file of a final model, global or a client's own.

        Raises:
            StageError: there is none; it says whose models the run has.
        """
        path = self._model(client)
        if not path.is_file():
            own = sorted(p.parent.name for p in self.path.glob("clients/*/model.safetensors"))
            names = f"; its clients have their own: --client {' | '.join(own)}" if own else ""
            shared = "; all its clients share the global model" if self.model_path.exists() else ""
            raise StageError(
                f"{path}: not found{names or shared or '; run `samfed federate` first'}"
            )
        return path

    def _model(self, client: str | None) -> Path:
        if client is None:
            return self.path / "models" / "global.safetensors"
        return self.private(client) / "model.safetensors"

    def begin(self, config: Config, fingerprint: str, *, mode: str, archive: Path) -> str | None:
        """Prepare the folder for a run with ``fingerprint``; return a sentence for the user.

        A run with the same fingerprint continues. Another run of this name is moved to ``archive``,
        or is an error if ``mode`` is ``resume``; ``restart`` moves it in any case.

        Raises:
            ConfigError: ``resume`` was asked for, but there is nothing that it may continue.
        """
        try:
            checkpoint = self.load_checkpoint()
            found = None if checkpoint is None else checkpoint.fingerprint
        except CorruptStoreError:
            if mode != "restart":
                raise
            found = "damaged"
        notice = None
        if mode == "resume" and found != fingerprint:
            state = "no checkpoint" if found is None else "a run with other parameters or data"
            raise ConfigError(f"--resume: found {state} in {self.path}; leave --resume out")
        if found is not None and (found != fingerprint or mode == "restart"):
            target = unused_name(archive / f"{self.path.name}-{found[:12]}")
            move(self.path, target)
            notice = f"{self.path}: moved the earlier run to {target}"
        text = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
        write_bytes(self.path / "params.yaml", text.encode())
        return notice

    def config(self) -> Config:
        """Return the parameters that the run was made with.

        Raises:
            StageError: there is no such run. ConfigError: they are not what this version knows.
        """
        path = self.path / "params.yaml"
        if not path.is_file():
            raise StageError(f"{path}: not found; run `samfed federate` first")
        try:
            return load_config(path, folder=Path())  # written relative to the current folder
        except ConfigError as error:
            raise ConfigError(f"{error}; run `samfed federate`, which wrote it") from error

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a round's checkpoint atomically and drop all but the last two."""
        self._checkpoints.save(checkpoint.round, checkpoint, before=checkpoint.round - 1)
        self._checkpoints.drop_after(checkpoint.round)

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the last round's checkpoint, or None.

        Raises:
            CorruptStoreError: its bytes are not what was written.
        """
        path = self._checkpoints.last()
        return None if path is None else load(path, Checkpoint)

    def save_examples(self, examples: Sequence[Example], client: str | None = None) -> None:
        """Keep example images: of D_p, or a client's, which go into its own folder."""
        folder = self.path if client is None else self.private(client)
        save_examples(folder / EXAMPLES, examples)

    def private(self, client: str) -> Path:
        """Return the folder that ``client`` alone writes to."""
        return self.path / "clients" / client

    def examples(self) -> list[Example]:
        """Return the example images of the last round: of the public set, then of each client.

        Names the files that are missing beside the others.

        Raises:
            StageError: the run is not complete, or was made before samfed kept any.
        """
        folders = [self.path] if self.model_path.exists() else []
        paths = [path / EXAMPLES for path in (*folders, *sorted(self.path.glob("clients/*")))]
        found = [path for path in paths if path.exists()]
        if not found:
            raise StageError(f"{self.path}: no example images; run `samfed federate` first")
        for path in sorted({*paths} - {*found}):
            log.warning("%s: not found, so not shown; run `samfed federate` again", path)
        return [example for path in found for example in load_examples(path)]

    def append_history(self, entry: dict[str, Any]) -> None:
        """Add one round to ``history.jsonl``, in place of an entry of a later or the same round."""
        kept = [line for line in self.history() if line["round"] < entry["round"]]
        text = "".join(to_json(line, sort_keys=False) + "\n" for line in [*kept, entry])
        write_bytes(self.path / "history.jsonl", text.encode())

    def history(self) -> list[dict[str, Any]]:
        """Return an entry for each round so far.

        Raises:
            DataError: a line of the file is no round.
        """
        path = self.path / "history.jsonl"
        history = []
        # bytes: str.splitlines also cuts at U+2028 and the like, which JSON allows within a string
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                _check_entry(entry, number)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                fault = f"line {number} is no round of a history ({error})"
                raise DataError(f"{path}: {fault}; run `samfed federate --restart`") from error
            history.append(entry)
        return history

    def as_json(self) -> dict[str, Any]:
        """Return the run's folder, its last round, its validation Dice and its privacy if any."""
        last = self.history()[-1]
        known = {"run": str(self.path), "rounds": last["round"], "val_dice": last["val"]["dice"]}
        return {**known, **last.get("privacy", {})}

    def text(self) -> str:
        """Return the same as one line for a person."""
        found = self.as_json()
        dice = "" if found["val_dice"] is None else f", validation Dice {found['val_dice']:.3f}"
        promise = "epsilon {epsilon:.3g} at delta {delta:g} for each client"
        privacy = f", {promise.format(**found)}" if "epsilon" in found else ""
        return f"{found['rounds']} rounds{dice}{privacy}; {self.path}"

    def save_model(self, weights: State, spec: ModelSpec, client: str | None = None) -> None:
        """Write a final model, global or a client's own, and its spec beside it, last.

        The same model gives the same bytes.
        """
        path = self._model(client)
        save(path, weights)
        sealed = spec.model_copy(update={"weights_sha256": file_sha256(path)})
        sealed.write(path.with_suffix(".json"))

    def spec(self, client: str | None = None) -> ModelSpec:
        """Return the spec of a final model, global or a client's own.

        Raises:
            StageError: the run is not complete, or was made before samfed wrote any.
            FormatError, CorruptStoreError: as ``read_spec``.
        """
        return read_spec(self._model(client).with_suffix(".json"))

    def load_model(self, client: str | None = None) -> State:
        """Return the weights of the global model, or of a client's own.

        Raises:
            StageError: the run is missing or not complete. CorruptStoreError: it is damaged.
        """
        return load(self.weights_path(client), State)

    def partition_sha256(self) -> str:
        """Return the sha256 of the ``partition.json`` that the run was made on.

        Raises:
            StageError: no checkpoint. CorruptStoreError: a damaged one.
        """
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise StageError(f"{self.path}: no such run; run `samfed federate` first")
        return checkpoint.partition

    def check_partition(self, partition_file: Path) -> None:
        """Refuse another partition than the run's: its test images may be the run's own.

        Raises:
            StageError: no checkpoint, or no partition. IdentityError: the partition changed since.
        """
        made_on = self.partition_sha256()
        if not partition_file.is_file():
            raise StageError(f"{partition_file}: not found; run `samfed prepare` first")
        if made_on != file_sha256(partition_file):
            raise IdentityError(
                f"{self.path}: made on another partition than {partition_file}; "
                "run `samfed federate` again"
            )


def _check_entry(entry: dict[str, Any], number: int) -> None:
    """Raise ValueError, KeyError or TypeError unless ``entry`` is that of round ``number``."""
    if type(entry["round"]) is not int or entry["round"] != number:
        raise ValueError(f"found round {entry['round']!r}, expected {number}")
    dice = entry["val"]["dice"]
    if dice is not None and not 0 <= dice <= 1:
        raise ValueError(f"found a validation Dice of {dice}, expected 0..1")
    reports = [*entry["clients"].values(), entry.get("server") or {}]
    if not all(isinstance(report, dict) for report in reports):
        raise ValueError("a report is no table")
    found = [value for report in reports for value in report.values()]
    if not all(value is None or isinstance(value, int | float) for value in found):
        raise ValueError("a report holds what is no number")
    if not all(isinstance(warning, str) for warning in entry.get("warnings") or ()):
        raise ValueError("a warning is no text")
