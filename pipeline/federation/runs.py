"""A run's folder, ``cache/runs/<name>/``: parameters, history, checkpoints, models.

``params.yaml`` as used, ``history.jsonl`` (one line a round), the last two of
``checkpoints/round_NNNN.safetensors``, and when the run is complete ``models/global.safetensors``,
or ``models/<client>.safetensors`` where clients have networks of their own. ``metrics.json`` comes
from ``samfed evaluate`` and ``report.html`` from ``samfed report``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from pipeline.config import Config, load_config
from pipeline.disk import file_sha256, move, write_bytes
from pipeline.errors import ConfigError, CorruptStoreError, DataError, IdentityError, StageError
from pipeline.federation.examples import Example, load_examples

_KEPT_CHECKPOINTS = 2

State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round depends on."""

    round: int
    weights: State  # of the global model; heterogeneous: of the server's
    client_states: State  # each client's AgreementState.as_tensor(), by name
    partition: str  # sha256 of the partition.json that the run was made on
    client_weights: dict[str, State] = field(default_factory=dict)  # heterogeneous: by name


class RunFolder:
    """Reads and writes one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def model_path(self) -> Path:
        """Weights of the final global model."""
        return self._model_path("global")

    def _model_path(self, name: str) -> Path:
        return self.path / "models" / f"{name}.safetensors"

    def begin(self, config: Config, fingerprint: str, *, mode: str, archive: Path) -> str | None:
        """Prepare the folder for a run with ``fingerprint``; returns a sentence for the user.

        A run with the same fingerprint continues. Another run of this name is moved to ``archive``,
        or is an error if ``mode`` is ``resume``; ``restart`` moves it in any case.

        Raises:
            ConfigError: ``resume`` was asked for, but there is nothing that it may continue.
        """
        try:
            found = self._fingerprint()
        except CorruptStoreError:
            if mode != "restart":
                raise
            found = "damaged"
        notice = None
        if mode == "resume" and found != fingerprint:
            state = "no checkpoint" if found is None else "a run with other parameters or data"
            raise ConfigError(f"--resume: found {state} in {self.path}; leave --resume out")
        if found is not None and (found != fingerprint or mode == "restart"):
            target = _free(archive, f"{self.path.name}-{found[:12]}")
            move(self.path, target)
            notice = f"{self.path}: moved the earlier run to {target}"
        self.path.mkdir(parents=True, exist_ok=True)
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
        return load_config(path)

    def save_checkpoint(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        """Write a round's checkpoint atomically and drop all but the last two.

        Later rounds' checkpoints go too: a run that begins again would resume from the old ones.
        """
        tensors = {f"weights/{name}": value for name, value in checkpoint.weights.items()}
        tensors |= {f"clients/{name}": value for name, value in checkpoint.client_states.items()}
        for client, state in checkpoint.client_weights.items():
            tensors |= {f"models/{client}/{name}": value for name, value in state.items()}
        meta = {
            "round": str(checkpoint.round),
            "fingerprint": fingerprint,
            "partition": checkpoint.partition,
        }
        path = self._checkpoints() / f"round_{checkpoint.round:04d}.safetensors"
        _save(path, meta, tensors)
        saved = self._saved()
        end = saved.index(path) + 1
        for old in (*saved[end:], *saved[: max(0, end - _KEPT_CHECKPOINTS)]):
            old.unlink()

    def load_checkpoint(self) -> Checkpoint | None:
        """The last round's checkpoint, or None.

        Raises:
            CorruptStoreError: its bytes are not what was written.
        """
        path = self._last()
        if path is None:
            return None
        meta, tensors = _load(path)
        models: dict[str, State] = {}
        for name, value in _under(tensors, "models/").items():
            client, _, entry = name.partition("/")
            models.setdefault(client, {})[entry] = value
        return Checkpoint(
            round=int(meta["round"]),
            weights=_under(tensors, "weights/"),
            client_states=_under(tensors, "clients/"),
            partition=meta["partition"],
            client_weights=models,
        )

    def examples(self) -> list[Example]:
        """Return the example images of the last round: of the public set, then of each client.

        Raises:
            StageError: the run is not complete, or was made before samfed kept any.
        """
        own = sorted(self.path.glob("clients/*/examples.safetensors"))
        found = [path for path in (self.path / "examples.safetensors", *own) if path.is_file()]
        if not found:
            raise StageError(f"{self.path}: no example images; run `samfed federate` first")
        return [example for path in found for example in load_examples(path)]

    def append_history(self, entry: dict[str, Any]) -> None:
        """Add one round to ``history.jsonl``, in place of an entry of a later or the same round."""
        kept = [line for line in self.history() if line["round"] < entry["round"]]
        text = "".join(json.dumps(line) + "\n" for line in [*kept, entry])
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
                entry["round"], entry["clients"], entry["val"]
            except (ValueError, KeyError, TypeError) as error:
                fault = f"line {number} is no round of a history ({error})"
                raise DataError(f"{path}: {fault}; run `samfed federate --restart`") from error
            history.append(entry)
        return history

    def as_json(self) -> dict[str, Any]:
        """Return the run's folder, its last round and the validation Dice there."""
        last = self.history()[-1]
        return {"run": str(self.path), "rounds": last["round"], "val_dice": last["val"]["dice"]}

    def text(self) -> str:
        """Return the same as one line for a person."""
        found = self.as_json()
        dice = "" if found["val_dice"] is None else f", validation Dice {found['val_dice']:.3f}"
        return f"{found['rounds']} rounds{dice}; {self.path}"

    def finish(self, models: dict[str, State]) -> None:
        """Write the final models by name: ``global``, or each client's own."""
        for name, weights in models.items():
            save_state(self._model_path(name), weights)

    def load_model(self, name: str = "global") -> State:
        """Weights of a final model: the global one, or a client's own by its name.

        Raises:
            StageError: the run is missing or not complete.
        """
        path = self._model_path(name)
        if not path.is_file():
            raise StageError(f"{path}: not found; run `samfed federate` first")
        return load_state(path)

    def partition_sha256(self) -> str:
        """sha256 of the ``partition.json`` that the run was made on.

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

    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _last(self) -> Path | None:
        found = self._saved()
        return found[-1] if found else None

    def _saved(self) -> list[Path]:
        """Checkpoints in the order of their rounds, of any number of digits."""
        found = self._checkpoints().glob("round_*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def _fingerprint(self) -> str | None:
        path = self._last()
        return None if path is None else _load(path)[0]["fingerprint"]


def save_state(path: Path, state: State) -> None:
    """Write a network's weights atomically; the same weights give the same bytes."""
    _save(path, {}, state)


def load_state(path: Path) -> State:
    """Read a network's weights as ``save_state`` wrote them.

    Raises:
        CorruptStoreError: its bytes are not what was written.
    """
    return _load(path)[1]


def _save(path: Path, meta: dict[str, str], tensors: State) -> None:
    whole = meta | {"sha256": _digest(meta, tensors)}
    content = safetensors.torch.save(
        # copies: clients may share a tensor, which safetensors refuses
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
        # one entry: safetensors writes several in random order
        metadata={"samfed": json.dumps(whole, sort_keys=True)},
    )
    write_bytes(path, content)


def _load(path: Path) -> tuple[dict[str, str], State]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["samfed"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = _digest(meta, tensors) == meta["sha256"]
    except Exception as error:  # safetensors and json raise many kinds for damaged bytes
        raise CorruptStoreError(f"{path}: damaged ({error}); delete it and run again") from error
    if not whole:
        raise CorruptStoreError(f"{path}: damaged (sha256 differs); delete it and run again")
    return meta, tensors


def _digest(meta: dict[str, str], tensors: State) -> str:
    """sha256 over what a checkpoint says of itself, and tensors: safetensors has no checksum."""
    own = [meta[key] for key in ("round", "fingerprint", "partition") if key in meta]
    digest = hashlib.sha256(json.dumps(own).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _under(tensors: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _free(folder: Path, name: str) -> Path:
    """A path that does not exist yet."""
    candidate, number = folder / name, 1
    while candidate.exists():
        number += 1
        candidate = folder / f"{name}-{number}"
    return candidate
