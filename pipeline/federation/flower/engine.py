"""The server's side: requests go to the nodes of a SuperLink, and replies come back in order.

Not ``Grid.send_and_receive``, which sleeps three seconds between two looks, and waits for ever for
a node that was started again: its first process took the request with it. A node that does not
answer is asked whether it is at work, and gets the request again where it is not. The same request
gives the same reply.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from uuid import uuid4

import httpx
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from pipeline.errors import SamfedError, first_line, one_line
from pipeline.federation.flower.letters import Letter, pack_body
from pipeline.federation.flower.site import told
from pipeline.federation.hosting import Run, body_of, same_body
from pipeline.federation.inputs import ClientContext
from pipeline.federation.messages import AnyRequest, ClientEntry, Reply
from pipeline.federation.rounds import MOST_IMAGES, Engine
from pipeline.federation.workplace import Workplace
from pipeline.stores.plain_data import from_bytes

log = logging.getLogger("samfed.flower")

JOIN_SECONDS = 300.0  # for every client's node to be there before the first round
LATE_SECONDS = 20.0  # for a node beside them to say who it is
LOOK_SECONDS = 5.0  # without a reply, before a node is asked whether it is at work
AWAY_SECONDS = 600.0  # a node may be away in a round, before the round goes on without it
_POLL_SECONDS = (0.05, 0.5)  # between two looks: at first, and where it takes long
_AWAY = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
}
_NOBODY: Mapping[int, str] = MappingProxyType({})
_NO_MESSAGE = "its reply is no message"
_LOSSES = 3  # of one request at its node, before the request is taken for the reason


@contextmanager
def over_grid(
    grid: Grid,
    contexts: Sequence[ClientContext],
    workplace: Workplace,
    *,
    registered: Mapping[int, str] = _NOBODY,
) -> Iterator[Engine]:
    """Reach clients through a SuperLink; pass it with its grid as ``federate(..., connect=)``.

    Args:
        registered: the names that nodes' keys are registered with, where they are with one.
    """
    yield FlowerEngine(grid, contexts, registered)


@dataclass
class _Task:
    """A letter on its way."""

    name: str  # the client's
    letter: Letter
    body: ConfigRecord | None
    message: str = ""  # Flower's id of what was sent last
    sent: float = field(default_factory=time.monotonic)  # when it was, first
    looked: float = field(default_factory=time.monotonic)  # when the site was last heard of
    question: str = ""  # whether it is at work; empty if that is not asked
    lost: bool = False  # it says that it is not
    away: float | None = None  # since when its node is
    losses: int = 0


class FlowerEngine:
    """Runs each client at its own site; replies come in the order of the requests.

    A site that fails, or is away for long, gives a reply with a fault, so that the round goes on.
    """

    def __init__(
        self,
        grid: Grid,
        contexts: Sequence[ClientContext],
        registered: Mapping[int, str] = _NOBODY,
    ) -> None:
        """Find every client's node, and let it load its data.

        Args:
            registered: as for ``over_grid``.

        Raises:
            SamfedError: a client has no node or two, or its site does not fit; it names the site.
        """
        self._grid, self._run, self._registered = grid, Run(), registered
        self._sent: tuple[AnyRequest, ConfigRecord] | None = None  # the last body
        self._limit = contexts[0].config.federate.round_timeout_s or math.inf  # seconds
        self._nodes = self._find([context.name for context in contexts])
        self._told = {each.name: told(each) for each in contexts}
        tasks = [self._send(_Task(name, self._letter("entry", name), None)) for name in self._told]
        answers = [self._answer(task, math.inf) for task in tasks]
        self.entries: Sequence[ClientEntry] = [
            _entry(task.name, letter)
            for task, letter in zip(tasks, answers, strict=True)
            if letter is not None
        ]

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the reply to each request, in the order of the requests."""
        pairs = [(request, self._send(self._task(request))) for request in requests]
        for request, task in pairs:
            letter = self._answer(task, self._limit)
            if letter is None:
                yield request.unanswered(self._limit)
                continue
            try:
                yield from_bytes(_usable(task.name, letter).body, Reply)
            except SamfedError as error:
                yield request.reply(fault=str(error).removeprefix(f"{task.name}: "))
            except ValueError as error:
                yield request.reply(fault=f"its reply is {error}")

    # --------------------------------------------------------------------------- who is there

    def _find(self, names: Sequence[str]) -> dict[str, int]:
        """Return each client's node, once all are there."""
        asked: dict[str, int] = {}  # nodes by the question that they have not answered
        known: dict[int, str] = {}
        began = time.monotonic()
        waited = False
        while True:
            new = set(self._grid.get_node_ids()) - known.keys() - set(asked.values())
            asked |= {self._push(node, Letter("who").pack()): node for node in sorted(new)}
            for message, node in tuple(asked.items()):  # one by one: none can spoil the others'
                found = self._pull(message)
                if found is not None:
                    del asked[message]
                if isinstance(found, Letter):
                    known[node] = self._introduced(node, found, known, names)
                elif found is not None and found.code not in _AWAY:
                    known[node] = f"node {node}, which sends no message"
            missing = [name for name in names if name not in known.values()]
            seconds = time.monotonic() - began
            if not missing and (not asked or seconds > LATE_SECONDS):
                return {name: node for node, name in known.items() if name in names}
            if seconds > JOIN_SECONDS:
                raise SamfedError(
                    f"{', '.join(missing)}: no node within {JOIN_SECONDS:g} s; found "
                    f"{', '.join(sorted(known.values())) or 'none'}; start one at each site with "
                    "`samfed site run`, or see why it does not reach the SuperLink"
                )
            if missing and seconds > LOOK_SECONDS and not waited:
                log.warning("waiting up to %g s for %s", JOIN_SECONDS, ", ".join(missing))
                waited = True
            time.sleep(_POLL_SECONDS[0])

    def _introduced(
        self, node: int, letter: Letter, known: dict[int, str], names: Sequence[str]
    ) -> str:
        """Return the client's name that a node gives, if it may take part.

        Who is registered by another name has no say: else each site could keep others out.

        Raises:
            SamfedError: another node has that name, or it runs another samfed.
        """
        name, version = one_line(letter.client), one_line(letter.version)
        own = self._registered.get(node, name)
        if name != own:
            log.warning("node %d says that it is %s, but its key is that of %s", node, name, own)
            return f"{name} with the key of {own}"
        if name not in names:
            log.warning("%s: no client of this run; its node %d is not asked", name, node)
            return name
        same = [other for other, its in known.items() if its == name]
        if same:
            raise SamfedError(
                f"{name}: found two nodes of this name, expected one; stop one of them, or give it "
                f"another --name (nodes {same[0]} and {node}, as `flwr supernode register` "
                "numbered them)"
            )
        if version != self._run.version:
            raise SamfedError(
                f"{name}: found samfed {version}, expected {self._run.version} as at the server; "
                "install it there"
            )
        log.info("%s: node %d", name, node)
        return name

    # --------------------------------------------------------------------------- letters

    def _task(self, request: AnyRequest) -> _Task:
        if self._sent is None or not same_body(self._sent[0], request):
            self._sent = request, pack_body(body_of(request))
        letter = self._letter("ask", request.client)
        letter = replace(letter, state_round=request.state_round, about=uuid4().hex)
        return _Task(request.client, letter, self._sent[1])

    def _letter(self, kind: str, name: str) -> Letter:
        run = self._run
        return Letter(kind, run=run.token, version=run.version, told=self._told[name])

    def _send(self, task: _Task) -> _Task:
        task.message = self._push(self._nodes[task.name], task.letter.pack(task.body))
        return task

    def _push(self, node: int, content: RecordDict) -> str:
        message = Message(content, dst_node_id=node, message_type="query")
        (sent,) = self._grid.push_messages([message])
        if not sent:
            raise SamfedError(f"node {node}: the SuperLink does not take a message for it")
        return sent

    def _pull(self, message: str) -> Letter | Error | None:
        """Return the answer to a message, if it is there, or why it never will be."""
        try:
            for found in self._grid.pull_messages([message]):
                return found.error if found.has_error() else Letter.unpack(found.content)
        except (httpx.HTTPError, OSError):  # no SuperLink
            raise
        except Exception as error:  # many kinds: a node may send any bytes
            return Error(ErrorCode.UNKNOWN, f"{_NO_MESSAGE} ({first_line(error)})")
        return None

    def _answer(self, task: _Task, limit: float) -> Letter | None:
        """Return the site's answer, or one with an error; None where it had ``limit`` seconds."""
        began, (first, last) = time.monotonic(), _POLL_SECONDS
        while True:
            found = self._pull(task.message)
            letter = self._doubt(task) if found is None else self._opened(task, found)
            if letter is not None or time.monotonic() - task.sent > limit:
                return letter
            time.sleep(min(last, first + (time.monotonic() - began) / 10))

    def _doubt(self, task: _Task) -> Letter | None:
        """Ask a site that has not answered whether it is at work; send again what it lost."""
        if task.lost:  # it was not at work on it, and no answer came before it said so
            return self._send_again(task)
        if task.away is not None:
            log.warning("%s: its node is back", task.name)
            task.away, task.looked = None, 0.0
        if task.question:
            told = self._pull(task.question)
            if told is not None:
                task.question, task.looked = "", time.monotonic()
                task.lost = isinstance(told, Letter) and not told.at_work
        elif time.monotonic() - task.looked > LOOK_SECONDS:
            question = Letter("busy", about=task.letter.about)
            task.question = self._push(self._nodes[task.name], question.pack())
        return None

    def _opened(self, task: _Task, found: Letter | Error) -> Letter | None:
        """Return what was found; None where the SuperLink says that the node is away."""
        if isinstance(found, Letter):
            return found
        if found.code not in _AWAY:
            reason = one_line(((found.reason or "").splitlines() or ["no reason given"])[0])
            if reason.startswith(_NO_MESSAGE):
                return _failure(task, reason)
            return _failure(task, f"its ClientApp failed ({reason}); see the SuperNode's log there")
        if self._nodes[task.name] in self._grid.get_node_ids():
            return self._send_again(task)
        if task.away is None:
            task.away = time.monotonic()
            log.warning("%s: its node is away; waiting up to %g s", task.name, AWAY_SECONDS)
        if time.monotonic() - task.away > AWAY_SECONDS:
            return _failure(task, f"its node was away for more than {AWAY_SECONDS:g} s")
        return None

    def _send_again(self, task: _Task) -> Letter | None:
        task.losses += 1
        if task.losses > _LOSSES:
            return _failure(task, f"its node lost the request {task.losses} times; see its log")
        log.warning("%s: its node lost a request, which is sent again", task.name)
        task.lost, task.question, task.away, task.looked = False, "", None, time.monotonic()
        self._send(task)
        return None


def _failure(task: _Task, reason: str) -> Letter:
    return replace(task.letter, client=task.name, error=reason)


def _usable(name: str, letter: Letter) -> Letter:
    """Return a letter that brings an answer.

    Raises:
        SamfedError: it brings none, or is another client's; the site is named.
    """
    if letter.client != name:
        raise SamfedError(
            f"{name}: found an answer by '{one_line(letter.client)}', expected its own"
        )
    if letter.error:
        raise SamfedError(f"{name}: {one_line(letter.error)}")
    return letter


def _entry(name: str, letter: Letter) -> ClientEntry:
    """Return what a site says of its client.

    Raises:
        SamfedError: it says nothing that can be read, or what no client can be; it is named.
    """
    try:
        entry: ClientEntry = from_bytes(_usable(name, letter).body, ClientEntry)
    except ValueError as error:
        raise SamfedError(f"{name}: what it says of itself is {first_line(error)}") from error
    counts = 0 < entry.images <= MOST_IMAGES and 0 <= entry.val_images <= MOST_IMAGES
    if entry.name != name or not counts:
        said = f"{entry.name} with {entry.images} images, {entry.val_images} to validate on"
        raise SamfedError(
            f"{name}: it says of itself that it is {one_line(said)}; expected its own name and at "
            "least one image; see what runs there"
        )
    return entry
