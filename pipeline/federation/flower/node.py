"""A site's node: one process that stays, and answers the letters that a SuperLink has for it.

It speaks Flower's Fleet API like Flower's own SuperNode, with TLS and a registered key. But it
never fetches or runs the bundle that a run was started with: whoever may start runs at the
SuperLink can ask only the samfed that is installed here. And data and networks stay loaded, where a
SuperNode starts a process for each message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from pipeline.disk import writer_lock
from pipeline.errors import NetworkError, one_line
from pipeline.federation.flower.fleet import Fleet
from pipeline.federation.flower.letters import Letter
from pipeline.federation.flower.link import Link, RefusedError, UnreachableError
from pipeline.federation.flower.site import Site, reply_to

log = logging.getLogger("samfed.site")

JOIN_SECONDS = 30.0  # for the SuperLink to answer at all
_SOON_SECONDS, _LATER_SECONDS = 0.1, 1.0  # between two looks for messages, at least and at most
_OF_WAITING = 0.25  # of the time since the last message: a SuperLink spends its time on looks
_SHORT = ("who", "busy")  # questions that are answered at once
_AWAY_SECONDS = 5.0  # between two tries where the SuperLink does not answer


def run_node(site: Site, link: Link, key: Path | None) -> NoReturn:
    """Answer for one client until somebody stops this process.

    Raises:
        NetworkError: the SuperLink never answered, is not to be trusted, or refuses this node.
        LockedStoreError: the site's node is running already.
    """
    cache = site.config.cache.root
    fleet = Fleet(link, key, cache / "nodes" / f"{site.name}.txt")
    with closing(fleet), writer_lock(cache / "locks" / f"node-{site.name}.lock"):
        _join(fleet)
        log.info("%s: node %d at %s, ready", site.name, fleet.number, link.address)
        try:
            _Node(site, fleet).serve()
        finally:
            with suppress(NetworkError):  # it hears nothing more of us, and finds out
                fleet.leave()


def _join(fleet: Fleet) -> None:
    """Join the SuperLink, which may have been started just now."""
    began = time.monotonic()
    while True:
        try:
            return fleet.join()
        except UnreachableError:
            if time.monotonic() - began > JOIN_SECONDS:
                raise
        time.sleep(_LATER_SECONDS)


@dataclass(frozen=True)
class _Answer:
    """A reply that has not been sent yet."""

    reply: Message
    letter: Letter
    seconds: float


def _pause(waited: float) -> float:
    """Return the seconds until the next look, of the seconds since the last message or answer."""
    return min(_LATER_SECONDS, max(_SOON_SECONDS, _OF_WAITING * waited))


class _Node:
    """The messages of a node: what a thread is at work on, and what has been answered."""

    def __init__(self, site: Site, fleet: Fleet) -> None:
        self._site, self._fleet = site, fleet
        self._todo: SimpleQueue[tuple[Message, Letter]] = SimpleQueue()
        self._done: SimpleQueue[_Answer] = SimpleQueue()
        self._unsent: deque[_Answer] = deque()
        self._requests: set[str] = set()  # that have come and are not answered yet
        # a daemon: a process that is told to end does not wait for a request
        threading.Thread(target=self._work, daemon=True, name="client").start()

    def serve(self) -> NoReturn:
        """Take and answer messages, for ever."""
        reached, last = True, time.monotonic()
        while True:
            try:
                self._fleet.beat()
                self._send()
                message = self._fleet.receive()
            except (UnreachableError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.unknown:
                    raise
                if reached:
                    log.warning("%s; trying again", error)
                reached = False
                time.sleep(_AWAY_SECONDS)
                continue
            except (ObjectPullError, ObjectPushError, ExceptionGroup) as error:
                log.warning("a message was lost on its way: %s", error)
                time.sleep(_LATER_SECONDS)
                continue
            if not reached:
                log.warning("the SuperLink answers again")
            reached = True
            if message is not None:
                last = time.monotonic()
                self._take(message)
                continue
            pause = _LATER_SECONDS if self._requests else _pause(time.monotonic() - last)
            with suppress(Empty):
                self._unsent.append(self._done.get(timeout=pause))
                last = time.monotonic()

    def _take(self, message: Message) -> None:
        """Answer a short question at once; leave the others to the thread."""
        letter = Letter.unpack(message.content)
        if letter.kind in _SHORT:
            self._unsent.append(self._answer(message, letter))
            return
        log.info("%s: %s", self._site.name, one_line(letter.kind))
        self._requests.add(letter.about)
        self._todo.put((message, letter))

    def _work(self) -> None:
        while True:
            self._done.put(self._answer(*self._todo.get()))

    def _answer(self, message: Message, letter: Letter) -> _Answer:
        began = time.monotonic()
        answer = reply_to(letter, self._site, self._requests.__contains__)
        reply = Message(answer.pack(), reply_to=message)
        return _Answer(reply, answer, time.monotonic() - began)

    def _send(self) -> None:
        """Send what is answered; what cannot be sent now is sent later."""
        with suppress(Empty):
            self._unsent.append(self._done.get_nowait())
        while self._unsent:
            answer = self._unsent[0]
            try:
                self._fleet.reply(answer.reply, answer.seconds)
            except RefusedError as error:  # most often the run is over, and nobody waits for it
                log.warning("%s: a reply was not taken, %s", self._site.name, error)
            self._unsent.popleft()
            if answer.letter.kind not in _SHORT:  # what is about a request does not end it
                self._requests.discard(answer.letter.about)
