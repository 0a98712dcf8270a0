"""What Flower carries: a letter, in one of its records; never a pickle."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, RecordDict
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import first_line

_NAME = "samfed"


@dataclass(frozen=True)
class Letter:
    """A question to a site, or what it answers.

    ``who`` asks a site for its name and version, ``entry`` for what it says of its client, ``ask``
    for the reply to a request, ``busy`` whether it is at work on the request ``about``.
    """

    kind: str  # who, entry, ask or busy
    run: str = ""  # which run it is about
    told: str = ""  # JSON of what the client is told of the run
    state_round: int = 0  # of the request; its body names neither this nor the client
    about: str = ""  # the request, for ``ask`` and ``busy``
    client: str = ""  # who answers
    version: str = ""  # of the samfed that asks or answers
    at_work: bool = False  # the answer to ``busy``
    error: str = ""  # why there is no answer; empty if nothing is wrong
    body: bytes = b""  # plain data as bytes

    def pack(self, body: ConfigRecord | None = None) -> RecordDict:
        """Return it as Flower's record; ``body`` is the body where it is packed already."""
        head = {key: value for key, value in asdict(self).items() if key != "body"}
        # apart from the head: Flower sends and keeps equal records once
        parts = {"head": ConfigRecord(head), "body": body or pack_body(self.body)}
        return RecordDict({f"{_NAME}.{part}": record for part, record in parts.items()})

    @staticmethod
    def unpack(content: RecordDict) -> Letter:
        """Return what ``pack`` made; of anything else, a letter with an error."""
        try:
            parts = [dict(content.config_records[f"{_NAME}.{part}"]) for part in ("head", "body")]
            return _LETTER.validate_python(parts[0] | parts[1])
        except (KeyError, ValidationError) as error:
            return Letter("", error=f"found no message of samfed's ({first_line(error)})")


_LETTER = TypeAdapter(Letter)


def pack_body(content: bytes) -> ConfigRecord:
    """Return a body as Flower's record."""
    return ConfigRecord({"body": content})
