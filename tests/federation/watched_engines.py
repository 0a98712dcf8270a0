"""Runs and engines for tests: what crosses can be seen, changed, or sent to another process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from forks import Forks

from pipeline.config import Config, NetworkConfig
from pipeline.federation.client import Client
from pipeline.federation.engines import InProcess, in_process
from pipeline.federation.inputs import ClientContext, load_public
from pipeline.federation.messages import AnyRequest, ClientEntry, Reply
from pipeline.federation.runs import RunFolder
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.runtime import resolve_device
from pipeline.stores.plain_data import from_bytes, to_bytes

NETWORKS = tuple(
    NetworkConfig(encoder=f"tu-{name}", encoder_depth=3, decoder_channels=(16, 8, 8))
    for name in ("test_byobnet", "test_resnet")
)


def changed(config: Config, name: str, *, own: bool = False, **federate: Any) -> Config:
    """Return settings of a run called ``name``, with equal networks or two in turn."""
    settings = {"name": name, "fusion_epochs": 1, **federate}
    return config.model_copy(
        update={
            "federate": config.federate.model_copy(update=settings),
            "model": config.model.model_copy(update={"clients": NETWORKS if own else ()}),
        }
    )


def models(run: RunFolder) -> dict[str, bytes]:
    """Return the final models that lie in a run's folder."""
    paths = [*run.path.glob("models/*"), *run.path.glob("clients/*/model.safetensors")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


Change = Callable[[AnyRequest, Reply], Reply]


@dataclass
class Watched:
    """Clients of this process, whose requests are kept and whose replies may be changed."""

    change: Change = lambda request, reply: reply
    seen: list[tuple[AnyRequest, Reply]] = field(default_factory=list)

    @contextmanager
    def connect(self, contexts: Sequence[ClientContext], workplace: Workplace) -> Iterator[Watched]:
        """Load the clients; pass this as ``federate(..., connect=)``."""
        with in_process(contexts, workplace) as self._inner:
            self.entries: Sequence[ClientEntry] = self._inner.entries
            yield self

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the replies, changed."""
        for request in requests:
            (reply,) = self._inner.run([request])
            reply = self.change(request, reply)
            self.seen.append((request, reply))
            yield reply


class Site:
    """Another process in a folder of its own, which answers for one client."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self._process, socket = forks.talk(__file__, cwd=folder)
        with socket:
            self._file = socket.makefile("rwb")

    def send(self, content: bytes) -> bytes:
        """Return the process's answer."""
        write_frame(self._file, content)
        return read_frame(self._file)

    def close(self) -> None:
        """End the process."""
        self._file.close()
        assert self._process.wait() == 0


class Remote:
    """Every message as bytes; one client's cross to a ``Site``, the others' stay here."""

    def __init__(self, site: Site, context: ClientContext, others: InProcess) -> None:
        self._site, self._name, self._others = site, context.name, others
        own: ClientEntry = from_bytes(site.send(context.to_json()), ClientEntry)
        self.entries = [own if entry.name == own.name else entry for entry in others.entries]

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield what is read back of every reply."""
        for request in requests:
            content = to_bytes(request)
            if request.client == self._name:
                yield from_bytes(self._site.send(content), Reply)
            else:
                read = from_bytes(content, AnyRequest)
                yield from (from_bytes(to_bytes(r), Reply) for r in self._others.run([read]))


def write_frame(file: IO[bytes], content: bytes) -> None:
    """Write ``content`` with its length before it."""
    file.write(len(content).to_bytes(8, "little") + content)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes:
    """Read what ``write_frame`` wrote; nothing at the end of the file."""
    return file.read(int.from_bytes(file.read(8), "little"))


def answer_all() -> None:
    """Answer for one client: a context (JSON) begins a run, then come its requests."""
    import torch

    torch.set_num_threads(1)
    client: Client | None = None
    while content := read_frame(sys.stdin.buffer):
        if content.startswith(b"{"):
            context = ClientContext.from_json(content)
            networks = build_networks(context.config, resolve_device("cpu"))
            workplace = Workplace(context.config, load_public(context), networks)
            client = Client(context, workplace)
            reply = to_bytes(client.entry)
        else:
            assert client is not None
            reply = to_bytes(client.answer(from_bytes(content, AnyRequest)))
        write_frame(sys.stdout.buffer, reply)


if __name__ == "__main__":
    answer_all()
