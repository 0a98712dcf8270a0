"""Where the dask engine sends requests, and when it gives a client up; no worker is there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import NoResultError
from pipeline.config import Config
from pipeline.errors import SamfedError
from pipeline.federation import cluster as on_dask
from pipeline.federation.cluster import DaskEngine
from pipeline.federation.inputs import ClientContext, PublicRows
from pipeline.federation.messages import ClientEntry, PredictRequest, Reply
from pipeline.stores.plain_data import to_bytes

NAMES = ["s", "t", "u", "v"]
LOOK = 5.0  # seconds


@dataclass
class Task:
    """A future of a client's answer."""

    client: str
    place: str
    asks: bool  # for more than the client's entry
    ready: float  # when it is answered
    status: str = "pending"

    def cancel(self) -> None:
        self.status = "cancelled"


@dataclass
class Machines:
    """Workers that answer one request after another, but for a mute one, or a mute client."""

    alive: list[str]
    takes: float = 1.0
    mute: set[str] = field(default_factory=set)
    changes: list[list[str]] = field(default_factory=list)  # who is there after each next look
    sent: list[tuple[str, str]] = field(default_factory=list)  # clients and places
    ended: list[str] = field(default_factory=list)
    free: dict[str, float] = field(default_factory=dict)  # when a worker is done with its requests
    nanny: bool = False
    device: str | None = None
    now: float = 0.0

    @property
    def client(self) -> Machines:
        return self

    def submit(self, work: Any, run: Any, context: bytes, body: Any, *_: Any, **to: Any) -> Task:
        name, (place,) = ClientContext.from_json(context).name, to["workers"]
        takes = math.inf if {name, place} & self.mute else self.takes
        self.free[place] = max(self.now, self.free.get(place, 0.0)) + takes
        task = Task(name, place, body is not None, self.free[place])
        if task.asks:
            self.sent.append((name, place))
            assert len(self.sent) < 50, "it sends the same for ever"
        return task

    def cancel(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            task.cancel()

    def addresses(self) -> list[str]:
        return sorted(self.alive)

    def end_worker(self, address: str) -> None:
        self.ended.append(address)
        self.alive = [each for each in self.alive if each != address] + ["new"] * self.nanny

    def result_soon(self, task: Task, name: str, within: float) -> bytes:
        wait = min(within, LOOK)
        if task.place not in self.alive or task.ready > self.now + wait:
            self.now += wait
            assert self.now < 1000, "it waits for ever"
            self.alive = self.changes.pop(0) if self.changes else self.alive
            raise NoResultError
        self.now = max(self.now, task.ready)
        reply = Reply(client=task.client, round_number=1)
        return to_bytes(reply if task.asks else ClientEntry(task.client, 1, 0))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that returns an engine on these machines, with a limit in seconds or none."""

    def started(machines: Machines, limit: float | None) -> DaskEngine:
        monkeypatch.setattr(on_dask.time, "monotonic", lambda: machines.now)
        settings = {"federate": {"round_timeout_s": limit}, "cache": {"root": str(tmp_path)}}
        config = Config.model_validate(settings)
        rows = PublicRows("", (), (), ())
        found = [
            ClientContext(name, index, config, None, None, rows, (), (), ())
            for index, name in enumerate(NAMES)
        ]
        return DaskEngine(machines, found)  # type: ignore[arg-type]

    return started


def answered(engine: DaskEngine) -> list[str]:
    """Ask every client; return who answered, in order."""
    requests = [PredictRequest(client=name, round_number=1, state_round=0) for name in NAMES]
    replies = list(engine.run(requests))
    assert [reply.client for reply in replies] == NAMES
    return [reply.client for reply in replies if not reply.fault]


def test_a_request_at_its_clients_old_worker_is_sent_again_when_that_dies(start: Any) -> None:
    """Its client has had another worker since one was added, which is still there."""
    machines = Machines(["a"])
    engine = start(machines, None)
    machines.mute, machines.changes = {"a"}, [["a", "b"], ["b"]]
    assert answered(engine) == NAMES
    assert machines.sent == [(name, place) for place in "ab" for name in NAMES]
    assert machines.ended == []


def test_a_request_that_loses_one_worker_after_another_ends_the_run(start: Any) -> None:
    machines = Machines(["a"])
    engine = start(machines, None)
    machines.mute, machines.changes = set("abcd"), [["b"], ["c"], ["d"], ["a"]]
    with pytest.raises(SamfedError, match="s: 4 workers died that it ran on; see their logs"):
        answered(engine)


def test_who_takes_too_long_loses_its_worker_and_nobody_elses_request(start: Any) -> None:
    machines = Machines(["a", "b"])
    engine = start(machines, 12.0)
    machines.mute = {"s"}
    before = machines.now
    assert answered(engine) == ["t", "u", "v"]
    assert machines.now - before == 12 + 1
    assert machines.ended == ["a"]
    assert machines.sent == [("s", "a"), ("t", "b"), ("u", "a"), ("v", "b"), ("u", "b")]
    machines.mute.clear()
    assert answered(engine) == NAMES  # what kept it busy is over
    assert machines.ended == ["a"]


def test_a_clients_time_begins_when_its_turn_comes(start: Any) -> None:
    machines = Machines(["a"], takes=4.0)
    engine = start(machines, 4.5)
    assert answered(engine) == NAMES
    assert machines.ended == []
    machines.takes, machines.nanny = 5.0, True
    assert answered(engine) == []
    assert len(machines.ended) == len(NAMES)
