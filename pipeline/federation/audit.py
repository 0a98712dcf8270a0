"""What leaves a client, written down where it is before it leaves.

``Client`` notes every answer, whatever engine carries it; an answer that cannot be noted is not
given. ``samfed site audit`` shows the notes of a run. A run that begins anew is noted behind its
earlier one: nothing is ever taken out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import Config
from pipeline.disk import is_folder_name, to_json
from pipeline.errors import ConfigError, DataError, StageError
from pipeline.stores.plain_data import tensors_of


@dataclass(frozen=True)
class Sent:
    """One answer that left: a line of ``cache/sent/<run>/<client>.jsonl``."""

    time: str  # ISO 8601, UTC
    round: int  # 0 before the first
    kind: str  # what it answers: entry, fit, predict, distil, evaluate, describe
    fields: dict[str, int]  # bytes of each field that says something

    def text(self) -> str:
        """Return it as one line."""
        fields = ", ".join(f"{name} {size}" for name, size in self.fields.items())
        return f"{self.time} round {self.round} {self.kind}: {fields}"


def note_sent(file: Path, kind: str, number: int, answer: Mapping[str, Any]) -> None:
    """Append a line on what is about to leave.

    Args:
        file: of the client. kind: what it answers. number: the round, 0 before the first.
        answer: every field that leaves.
    """
    empty = (type(None), str, dict)
    sizes = {k: _bytes(v) for k, v in answer.items() if not isinstance(v, empty) or v}
    sent = Sent(datetime.now(UTC).isoformat(timespec="seconds"), number, kind, sizes)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as log:  # in one write, so that a kill leaves whole lines
        log.write(to_json(asdict(sent), sort_keys=False).encode() + b"\n")


def _bytes(value: Any) -> int:
    """Return the bytes of the tensors in a field, uncompressed; without any, those of its JSON."""
    tensors = tensors_of(value).values()
    return sum(each.nbytes for each in tensors) if tensors else len(to_json(value))


def sent_file(cache: Path, run: str, client: str) -> Path:
    """Return where what a client sends in a run is noted."""
    return cache / "sent" / run / f"{client}.jsonl"


@dataclass(frozen=True)
class Audit:
    """What the clients of a cache sent in a run."""

    run: str
    sent: dict[str, list[Sent]]  # by client
    damaged: list[str]  # lines that cannot be read, by file and number

    exit_code = DataError.exit_code  # of the command, if there are such

    def totals(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each field that left, by what was answered."""
        totals = defaultdict[str, Counter[str]](Counter)
        for each in (line for lines in self.sent.values() for line in lines):
            totals[each.kind].update(each.fields)
        return {kind: dict(found) for kind, found in totals.items()}

    def text(self) -> str:
        """Return a line for each answer, and the bytes of each field in all of them."""
        lines = [f"{client} {each.text()}" for client, every in self.sent.items() for each in every]
        for kind, found in self.totals().items():
            fields = ", ".join(f"{name} {size}" for name, size in found.items())
            lines.append(f"total {kind}: {fields} bytes")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return asdict(self) | {"totals": self.totals()}

    def failures(self) -> list[str]:
        """Return a line for each that is damaged."""
        return self.damaged


def audit(config: Config, run: str | None = None) -> Audit:
    """Read what the clients of this cache sent in a run, ``federate.name`` if None.

    Raises:
        ConfigError: no run can have this name. StageError: nothing was sent in such a run; names
        those that there are.
    """
    name = run or config.federate.name
    if not is_folder_name(name):
        raise ConfigError(f"run {name!r}: expected the name of a folder under cache/sent")
    folder = config.cache.root / "sent"
    files = sorted((folder / name).glob("*.jsonl"))
    if not files:
        runs = ", ".join(sorted({each.parent.name for each in folder.glob("*/*.jsonl")})) or "none"
        raise StageError(f"{folder / name}: nothing was sent in this run; found runs: {runs}")
    found = Audit(name, {}, [])
    for file in files:
        found.sent[file.stem] = list[Sent]()
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                found.sent[file.stem].append(_SENT.validate_json(line))
            except ValidationError:
                found.damaged.append(f"{file}: line {number} is damaged")
    return found


_SENT = TypeAdapter(Sent)
