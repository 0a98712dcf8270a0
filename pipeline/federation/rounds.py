"""A round at hand, and what differs between the two kinds of rounds."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.errors import SamfedError, one_line
from pipeline.federation.agreement import Calibration
from pipeline.federation.compression import Packed
from pipeline.federation.messages import AnyRequest, ClientEntry, FitRequest, Reply
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.federation.schedule import Rates
from pipeline.federation.streams import Streams
from pipeline.stores.plain_data import State

MOST_IMAGES = 2**31  # of a client
_MOST_METRICS = 1000  # of a reply: three a class, of which there are 254 at most, and some 30
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}")  # the name of one


class TooFewError(SamfedError):
    """Fewer clients than needed sent what counts in a round."""


class Engine(Protocol):
    """Where clients run. It brings each request to its client, and the replies back in order.

    All engines call ``Client.answer`` and nothing else, so that they change where a client runs and
    never what it computes.

    A client has ``federate.round_timeout_s`` seconds (None: any time) for each request, from when
    its turn comes. Then the engine yields ``request.unanswered(seconds)`` and goes on. What the
    client comes to say later is dropped, also where its next request is on the way by then, and
    what keeps it busy must not keep others from answering. Its private state of that request may
    still be written, and is never asked for. An engine that cannot give a client up says so.
    """

    entries: Sequence[ClientEntry]  # what each client says of itself, in the clients' order

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the reply to each request, in the order of the requests."""


def asked(engine: Engine, requests: Sequence[AnyRequest]) -> Iterator[tuple[AnyRequest, Reply]]:
    """Yield each request with its reply.

    A reply in another client's name, to another round, or that no samfed gives, becomes one with a
    fault. A fault is one line.
    """
    for request, reply in zip(requests, engine.run(requests), strict=True):
        odd = _odd(request, reply)
        if odd is not None:
            yield request, request.reply(fault=one_line(odd))
        elif reply.fault:
            yield request, replace(reply, fault=one_line(reply.fault))
        else:
            yield request, reply


def _odd(request: AnyRequest, reply: Reply) -> str | None:
    """Return why nothing of a reply can be believed, or None: a site may run anything."""
    if (reply.client, reply.round_number) != (request.client, request.round_number):
        return f"it answers as {reply.client} in round {reply.round_number}"
    if not (0 <= reply.images <= MOST_IMAGES and 0 <= reply.seconds < math.inf):
        return f"it counts {reply.images} images, and {reply.seconds} s of work"
    if len(reply.metrics) > _MOST_METRICS:
        return f"it has {len(reply.metrics)} numbers, more than {_MOST_METRICS}"
    odd = [name for name in reply.metrics if _METRIC.fullmatch(name) is None]
    return f"it names a number '{odd[0]}'" if odd else None


@dataclass
class Round:
    """What is known when a round begins, and what its clients have reported so far."""

    before: Checkpoint
    clients: Sequence[str]  # who takes part, in the clients' order
    rates: Rates
    engine: Engine
    min_clients: int = 1  # that must be left
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # by client
    server_terms: dict[str, float] = field(default_factory=dict)
    moments: dict[str, State] = field(default_factory=dict)  # of the server's optimiser, after it
    warnings: list[str] = field(default_factory=list)
    rejected: set[str] = field(default_factory=set)  # clients whose update does not count
    refusals: list[str] = field(default_factory=list)  # those of the warnings that name why

    @property
    def number(self) -> int:
        """The round's number, from 1."""
        return self.before.round + 1

    def streams(self, seed: int) -> Streams:
        """Return the random streams of the server's own work, for the run's seed."""
        return Streams(seed, round_number=self.number)

    def address(self, client: str) -> dict[str, Any]:
        """Return what every request of the round to ``client`` says."""
        return self.before.address(client, self.number)

    def ask(self, requests: Sequence[AnyRequest]) -> Iterator[Reply]:
        """Yield the reply to each request, in order.

        Its metrics, the client's seconds, and the tensors' bytes either way go to the reports.
        A client that did not answer in time is rejected, and nothing is yielded for it.
        """
        for request, reply in asked(self.engine, requests):
            report = self.reports.setdefault(reply.client, {})
            report |= reply.metrics | {
                "images": reply.images,
                "seconds": round(report.get("seconds", 0.0) + reply.seconds, 3),
                "bytes_up": report.get("bytes_up", 0) + reply.nbytes,
                "bytes_down": report.get("bytes_down", 0) + request.nbytes,
            }
            if reply.timed_out:
                self.reject_update(reply.client, reply.fault)
            else:
                yield reply

    @property
    def left(self) -> list[str]:
        """The clients that take part and have not been rejected."""
        return [name for name in self.clients if name not in self.rejected]

    def reject_update(self, client: str, reason: str) -> None:
        """Go on without a client's update, and say why."""
        self.rejected.add(client)
        self.refuse(f"{client}: update rejected, {reason}")

    def refuse(self, warning: str) -> None:
        """Warn of what a client sent that does not count."""
        self.refusals.append(warning)
        self.warnings.append(warning)

    def require(self, count: int, what: str, fewest: int = 1) -> None:
        """Check that enough clients are left after so many sent something usable.

        Raises:
            TooFewError: fewer than ``fewest`` or ``federate.min_clients``; it names the others.
        """
        expected = max(fewest, self.min_clients)
        if count < expected:
            found = f"{count} of {len(self.clients)} clients" if count else "no client"
            reasons = "; ".join(self.refusals) or "no other took part"
            raise TooFewError(
                f"round {self.number}: {found} sent {what}, expected {expected} ({reasons}); "
                "lower federate.learning_rate or federate.min_clients"
            )

    def entry(self) -> dict[str, Any]:
        """Return the round's entry of the history."""
        return {
            "round": self.number,
            "unlabelled_weight": self.rates.unlabelled_weight,
            "learning_rate": self.rates.learning_rate,
            "clients": {name: finite(report) for name, report in self.reports.items()},
            "server": finite(self.server_terms),
            "rejected": sorted(self.rejected),
            "warnings": self.warnings,
        }


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return ``numbers`` as JSON takes them: what is not finite becomes null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }


class Strategy(ABC):
    """What a round is: an average of weights, or an exchange of predictions."""

    @abstractmethod
    def begin(self, this: Round) -> None:
        """Do what comes before the local updates."""

    @abstractmethod
    def fit_request(self, this: Round, client: str) -> FitRequest:
        """Return the request for a client's local update."""

    def accept(self, this: Round, reply: Reply) -> str | None:
        """Take in an update without a fault; return why it cannot be used, or None if it can."""
        return None

    def review(self, this: Round) -> None:
        """Reject what cannot be used beside the others, and ``require`` enough when all are in."""
        this.require(len(this.left), "a usable update")

    @abstractmethod
    def finish(self, this: Round) -> State:
        """Return the server's weights after the round."""

    def shared(self, weights: State) -> State | None:
        """Return the weights of the model that answers for all clients; None: each has its own."""
        return None

    def broadcast(self, weights: State) -> State | Packed | None:
        """Return ``shared`` weights as they travel to the clients of a round."""
        return self.shared(weights)

    def conclude(self, run: RunFolder, weights: State) -> Calibration | None:
        """Keep what the run leaves behind at the server; return its model's calibration."""
        return None
