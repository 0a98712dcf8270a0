"""A process that hosts clients for a server elsewhere: requests and replies as bytes.

An engine brings bytes to ``answer`` and back; what a run's clients share is loaded once, and kept
until another run asks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields, replace
from uuid import uuid4

from pipeline import __version__
from pipeline.cluster import check_worker
from pipeline.config import Config
from pipeline.federation.client import Client
from pipeline.federation.inputs import RESULT_VERSION, ClientContext, load_public
from pipeline.federation.messages import AnyRequest
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.runtime import resolve_device, torch_threads
from pipeline.stores.plain_data import from_bytes, to_bytes

VERSION = f"{__version__} (results of version {RESULT_VERSION})"
_ADDRESS = {"client", "state_round"}  # the fields of a request that differ from client to client


@dataclass(frozen=True)
class Run:
    """What every message of a run says, so that a host can refuse it or find what it loaded."""

    token: str = field(default_factory=lambda: uuid4().hex)
    version: str = VERSION


# --------------------------------------------------------------------------- at the server


def body_of(request: AnyRequest) -> bytes:
    """Return what a request says but for its address."""
    return to_bytes(replace(request, client="", state_round=0))


def same_body(one: AnyRequest, other: AnyRequest) -> bool:
    """Return whether two requests say the same but for their address; tensors count by identity."""
    names = {each.name for each in fields(one)} - _ADDRESS
    pairs = [(getattr(one, name), getattr(other, name)) for name in names if hasattr(other, name)]
    return type(one) is type(other) and all(
        a is b or (isinstance(a, int | str) and a == b) for a, b in pairs
    )


# --------------------------------------------------------------------------- at the host


class _Site:
    """The clients of one run on this process, and what they share."""

    def __init__(self, run: Run, context: ClientContext) -> None:
        config = context.config
        check_worker(run.version, VERSION, [config.cache.root / "images"])
        networks = build_networks(config, resolve_device(config.federate.device))
        self.workplace = Workplace(config, load_public(context), networks)
        self.clients: dict[bytes, tuple[Client, Config]] = {}
        self._body: tuple[bytes, AnyRequest] | None = None

    def client(self, content: bytes) -> tuple[Client, Config]:
        """Return the client of this context; its data is loaded once."""
        if content not in self.clients:
            context = ClientContext.from_json(content)
            self.clients[content] = Client(context, self.workplace), context.config
        return self.clients[content]

    def request(self, body: bytes) -> AnyRequest:
        """Return what a body says; the last one is kept, as many clients get the same."""
        if self._body is None or self._body[0] is not body:
            self._body = body, from_bytes(body, AnyRequest)
        return self._body[1]


_turn = threading.Lock()  # clients of one process take turns
_sites: dict[Run, _Site] = {}  # the last run's


def answer(run: Run, context: bytes, body: bytes | None, state_round: int) -> bytes:
    """Return a client's reply, or its entry where there is no body.

    Raises:
        SamfedError: this process runs another samfed, or does not see the coordinator's files.
    """
    with _turn:
        if run not in _sites:
            _sites.clear()
            _sites[run] = _Site(run, ClientContext.from_json(context))
        site = _sites[run]
        client, config = site.client(context)
        if body is None:
            return to_bytes(client.entry)
        request = replace(site.request(body), client=client.entry.name, state_round=state_round)
        with torch_threads(config.federate.threads):
            return to_bytes(client.answer(request))


def forget(run: Run) -> None:
    """Drop what this process has loaded for a run."""
    with _turn:
        _sites.pop(run, None)
