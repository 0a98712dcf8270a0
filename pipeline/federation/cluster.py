"""Stage two on dask: every client has its place on a worker, where its data is loaded once.

Workers see ``cache.root`` under the coordinator's path, and read a client's stores and its private
state there. What many requests have in common, above all the broadcast weights, lies in a file
there, which each worker reads once. A lost worker's clients get another place, and their requests
are answered again: a client that is asked the same gives the same answer.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from uuid import uuid4

from pipeline.cluster import Cluster, Future, NoResultError, Workers
from pipeline.disk import naming
from pipeline.errors import SamfedError
from pipeline.federation.engines import Connect, in_process
from pipeline.federation.hosting import Run, answer, body_of, forget, same_body
from pipeline.federation.inputs import ClientContext
from pipeline.federation.messages import AnyRequest, ClientEntry, Reply
from pipeline.federation.rounds import Engine
from pipeline.federation.workplace import Workplace
from pipeline.params import absolute
from pipeline.stores.plain_data import from_bytes, to_bytes

_AHEAD = 4  # requests that a worker has before their replies are asked for
_LOSSES = 3  # of the worker that a request is with, before the request is taken for the reason


def reach(workers: Workers | None) -> Connect:
    """Return how to reach clients on ``workers``, entered for the run; None is this process."""
    return in_process if workers is None else partial(_on_cluster, workers)


@contextmanager
def _on_cluster(
    workers: Workers, contexts: Sequence[ClientContext], workplace: Workplace
) -> Iterator[Engine]:
    with workers as cluster:
        engine = DaskEngine(cluster, contexts)
        try:
            yield engine
        finally:
            engine.close()


@dataclass
class _Task:
    """A request on its way."""

    name: str  # the client's
    request: AnyRequest | None  # None asks for the client's entry
    future: Future
    place: str  # the worker that it was sent to, which may no longer be the client's
    sent: float  # when, in seconds
    losses: int = 0


class DaskEngine:
    """Runs each client on its worker; replies come in the order of the requests.

    Every method raises SamfedError: a client's own; the scheduler is gone, or had no worker for
    ``WORKERS_SECONDS``; one request lost its worker again and again.
    """

    def __init__(self, cluster: Cluster, contexts: Sequence[ClientContext]) -> None:
        """Load every client on its worker."""
        self._cluster, self._run = cluster, self.new_run()
        self._contexts = {
            context.name: _for_workers(context, cluster).to_json() for context in contexts
        }
        self._places: dict[str, str] = {}  # a client's worker
        self._sent: tuple[AnyRequest, Path] | None = None  # a request, and the file of its body
        self._bodies = _for_workers(contexts[0], cluster).run / "requests"
        self._limit = contexts[0].config.federate.round_timeout_s or math.inf  # seconds
        self._heard: dict[str, float] = {}  # when a worker's last answer was taken
        replies = self._answers((name, None) for name in self._contexts)
        self.entries: Sequence[ClientEntry] = [from_bytes(each, ClientEntry) for each in replies]

    @staticmethod
    def new_run() -> Run:
        """Return what the tasks of a new run say."""
        return Run()

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the reply to each request, in the order of the requests."""
        for content in self._answers((request.client, request) for request in requests):
            yield from_bytes(content, Reply)

    def close(self) -> None:
        """Let the workers forget the run's clients."""
        self._cluster.tell(forget, self._run)

    def _answers(self, asked: Iterable[tuple[str, AnyRequest | None]]) -> Iterator[bytes]:
        """Yield the bytes of each answer; few requests are on their way at once."""
        self._place(self._cluster.addresses())
        asked, waiting = iter(asked), deque[_Task]()
        try:
            while True:
                room = _AHEAD * len(set(self._places.values())) - len(waiting)
                for name, request in islice(asked, max(0, room)):
                    waiting.append(_Task(name, request, *self._submit(name, request)))
                if not waiting:
                    return
                yield self._first_answer(waiting)
                waiting.popleft()
        finally:
            self._sent = None
            shutil.rmtree(self._bodies, ignore_errors=True)  # what a killed run left there, too
            self._cluster.cancel(task.future for task in waiting)

    def _first_answer(self, waiting: Sequence[_Task]) -> bytes:
        """Return the first task's answer, or what stands for it once the client had its time.

        Meanwhile send again what lost its worker.
        """
        task = waiting[0]
        while True:
            try:
                within = max(0.0, self.time_left(task))
                content: bytes = self._cluster.result_soon(task.future, task.name, within)
            except NoResultError:
                self._find_lost(waiting)
                if task.request is not None and self.time_left(task) <= 0:
                    self._give_up(waiting)
                    return to_bytes(task.request.unanswered(self._limit))
            else:
                self._heard[task.place] = time.monotonic()
                return content

    def time_left(self, task: _Task) -> float:
        """Return how many seconds the first of a worker's tasks has left.

        Its turn came when it was sent or the one before it was over, which is known once its answer
        was taken. To load a client takes what it takes.
        """
        if task.request is None:
            return math.inf
        turn = max(task.sent, self._heard.get(task.place, 0.0))
        return turn + self._limit - time.monotonic()

    def _give_up(self, waiting: Sequence[_Task]) -> None:
        """End the worker that the first task keeps busy: no thread of it can be stopped."""
        late, *others = waiting
        late.future.cancel()
        self._cluster.end_worker(late.place)
        self._find_lost(others, ended=late.place)

    def _find_lost(self, waiting: Iterable[_Task], *, ended: str = "") -> None:
        """Send anew each task whose worker is gone.

        Args:
            ended: a worker that was ended for another task's sake.
        """
        alive = self._cluster.addresses()
        self._place(alive)
        for task in waiting:
            if task.place in alive and task.future.status not in ("cancelled", "lost"):
                continue
            task.losses += task.place != ended
            if task.losses > _LOSSES:
                raise SamfedError(
                    f"{task.name}: {task.losses} workers died that it ran on; see their logs, most "
                    "often memory is short"
                )
            task.future.cancel()
            task.future, task.place, task.sent = self._submit(task.name, task.request)

    def _place(self, alive: Sequence[str]) -> None:
        """Give every client a worker that is there, evenly; who has one that is there keeps it."""
        most = -(-len(self._contexts) // len(alive))
        load: Counter[str] = Counter(dict.fromkeys(alive, 0))
        places = dict[str, str]()
        for name, place in self._places.items():
            if place in load and load[place] < most:
                places[name] = place
                load[place] += 1
        for name in self._contexts:
            if name not in places:
                places[name] = min(load, key=load.__getitem__)
                load[places[name]] += 1
        self._places = places

    def _submit(self, name: str, request: AnyRequest | None) -> tuple[Future, str, float]:
        """Send a request to the client's worker; return its future, that worker, and when."""
        place = self._places[name]
        body, state_round = (None, 0) if request is None else self._body(request)
        future = self._cluster.client.submit(
            answer_file,
            self._run,
            self._contexts[name],
            body,
            state_round,
            workers=[place],
            pure=False,
        )
        return future, place, time.monotonic()

    def _body(self, request: AnyRequest) -> tuple[str, int]:
        """Return the file of what requests to many clients have in common."""
        if self._sent is None or not same_body(self._sent[0], request):
            content = body_of(request)
            self._sent = request, self._bodies / uuid4().hex
            self._bodies.mkdir(parents=True, exist_ok=True)
            with naming(self._sent[1]):  # not durable: a run that stops asks anew
                self._sent[1].write_bytes(content)
        return str(self._sent[1]), request.state_round


def _for_workers(context: ClientContext, cluster: Cluster) -> ClientContext:
    """Return the context with paths and a device that hold on the workers."""
    config = absolute(context.config)
    federate = config.federate.model_copy(
        update={"device": cluster.device or config.federate.device}
    )
    return replace(context, config=config.model_copy(update={"federate": federate}))


# --------------------------------------------------------------------------- on a worker


def answer_file(run: Run, context: bytes, body: str | None, state_round: int) -> bytes:
    """Return ``answer`` to the body in a file."""
    return answer(run, context, None if body is None else _read(body), state_round)


@lru_cache(maxsize=1)
def _read(path: str) -> bytes:
    return Path(path).read_bytes()
