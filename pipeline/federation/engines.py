"""Where clients run: in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from pipeline.federation.client import Client
from pipeline.federation.inputs import ClientContext
from pipeline.federation.messages import AnyRequest, ClientEntry, Reply
from pipeline.federation.rounds import Engine
from pipeline.federation.workplace import Workplace

log = logging.getLogger("samfed.federation")

#: How clients are reached for as long as it is entered.
Connect = Callable[[Sequence[ClientContext], Workplace], AbstractContextManager[Engine]]


@contextmanager
def in_process(contexts: Sequence[ClientContext], workplace: Workplace) -> Iterator[InProcess]:
    """Load every client into this process, where all share ``workplace``."""
    if contexts[0].config.federate.round_timeout_s is not None:
        log.warning(
            "federate.round_timeout_s: no client can be stopped in this process, so it is waited "
            "for; use --workers, --scheduler or --superlink"
        )
    yield InProcess([Client(context, workplace) for context in contexts])


class InProcess:
    """Runs the clients of this process in turn; one reply is in memory at a time."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.entries: Sequence[ClientEntry] = [client.entry for client in clients]
        self._clients = dict(zip([entry.name for entry in self.entries], clients, strict=True))

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the reply to each request, in the order of the requests."""
        for request in requests:
            yield self._clients[request.client].answer(request)
