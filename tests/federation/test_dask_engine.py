"""Stage two on dask workers: the same bytes, one of them killed, and what stays where it is."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import distributed
import pytest
from conftest import call, digest, write_params
from dask_processes import Workers, thread_workers
from forks import Forks
from watched_engines import Watched, changed, models

from pipeline.cluster import Cluster, check_worker, connect
from pipeline.config import Config
from pipeline.errors import SamfedError
from pipeline.federation import hosting
from pipeline.federation.client import Client
from pipeline.federation.cluster import DaskEngine, reach
from pipeline.federation.inputs import load_inputs
from pipeline.federation.messages import AnyRequest, EvaluateRequest, FitRequest, Reply
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Workers]:
    """A scheduler and two workers; the last test that uses them ends the scheduler."""
    started = Workers(tmp_path_factory.mktemp("dask"), forks)
    started.add(2)
    yield started
    started.stop()


@pytest.fixture
def threads() -> Iterator[distributed.Client]:
    with thread_workers(2) as client:
        yield client


@pytest.mark.parametrize("own", [False, True])
def test_processes_give_the_same_bytes_though_one_is_killed(
    labelled: Config, workers: Workers, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr("pipeline.cluster.LOOK_SECONDS", 0.5)
    packed = {"compression": "none" if own else "int8"}
    here = federate(changed(labelled, "here", own=own, **packed))
    killed = workers.processes[-1]

    def kill(what: str, done: int, total: int, note: str = "", /) -> None:
        if "rounds" in what and done == 1 and not own:  # once is enough
            killed.kill()
            killed.wait()
            workers.add(1)

    config = changed(labelled, "there", own=own, **packed)
    there = federate(config, connect=reach(connect(workers.address)), progress=kill)
    assert models(there) == models(here)
    assert digest(there.path / "clients") == digest(here.path / "clients")
    assert [entry["val"] for entry in there.history()] == [e["val"] for e in here.history()]


def test_the_command_line(labelled: Config, workers: Workers, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", changed(labelled, "cli", rounds=1))
    both = call("federate", "--params", params, "--workers", "2", "--scheduler", "tcp://x:1")
    assert both.exit_code == 2
    assert "--scheduler and --workers: give one of them" in both.output
    result = call("federate", "--params", params, "--scheduler", workers.address)
    assert result.exit_code == 0, result.output
    here = federate(changed(labelled, "cli_here", rounds=1))
    assert models(RunFolder(labelled.cache.root / "runs/cli")) == models(here)


def test_a_worker_that_hangs_costs_one_client_one_round(
    labelled: Config, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other clients move and count; when it comes back, what it writes harms nobody."""
    monkeypatch.setattr("pipeline.cluster.LOOK_SECONDS", 0.5)
    hung = workers.processes[-1]
    with connect(workers.address) as cluster:
        place = {pid: it for it, pid in cluster.client.run(os.getpid).items()}[hung.pid]

    def time_left(engine: DaskEngine, task: Any) -> float:
        late = getattr(task.request, "round_number", 0) == 2 and task.place == place
        return 0.0 if late else 60.0  # a busy machine may take any time

    def hang(what: str, done: int, total: int, note: str = "", /) -> None:
        if "rounds" in what and done <= 2:
            os.kill(hung.pid, signal.SIGSTOP if done == 1 else signal.SIGCONT)

    monkeypatch.setattr(DaskEngine, "time_left", time_left)
    config = changed(labelled, "hung", rounds=3, round_timeout_s=7)
    there = federate(config, connect=reach(connect(workers.address)), progress=hang)
    hung.wait(timeout=60)  # nobody needs it any more
    (late,) = there.history()[1]["rejected"]
    fault = "update rejected, no answer within 7 s (federate.round_timeout_s)"
    assert f"{late}: {fault}" in there.history()[1]["warnings"]

    def silent(request: AnyRequest, reply: Reply) -> Reply:
        misses = isinstance(request, FitRequest) and request.round_number == 2
        return request.unanswered(7) if misses and request.client == late else reply

    here = federate(changed(labelled, "silent", rounds=3), connect=Watched(silent).connect)
    assert models(there) == models(here)
    assert [e["rejected"] for e in there.history()] == [e["rejected"] for e in here.history()]
    assert [e["val"] for e in there.history()] == [e["val"] for e in here.history()]


def test_a_scheduler_lost_in_a_round_is_one_line(
    labelled: Config, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.CONNECT_SECONDS", 3)  # dask tries again for as long
    real, answers = Cluster.result_soon, list[bytes]()

    def result_soon(cluster: Cluster, *asked: Any) -> Any:
        answers.append(real(cluster, *asked))
        if len(answers) == 14:  # entries, a round of fits and scores, and two fits more
            workers.processes[0].kill()
            workers.processes[0].wait()
        return answers[-1]

    monkeypatch.setattr(Cluster, "result_soon", result_soon)
    config = changed(labelled, "lost")
    with pytest.raises(SamfedError, match="the dask scheduler is gone; run the same command again"):
        federate(config, connect=reach(connect(workers.address)))
    assert len(RunFolder(labelled.cache.root / "runs/lost").history()) == 1
    again, straight = federate(config), federate(changed(labelled, "straight"))
    assert models(again) == models(straight)


def test_a_clients_data_is_loaded_once_and_what_is_shared_travels_once(
    labelled: Config, threads: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    read: list[Path] = []

    class Loaded(Client):
        def __init__(self, context, workplace) -> None:  # type: ignore[no-untyped-def]
            loaded.append(context.name)
            super().__init__(context, workplace)

    real = Path.read_bytes

    def reading(path: Path) -> bytes:
        if path.parent.name == "requests":
            read.append(path)
        return real(path)

    monkeypatch.setattr(hosting, "Client", Loaded)
    monkeypatch.setattr(Path, "read_bytes", reading)
    config = changed(labelled, "once", rounds=3)
    run = federate(config, connect=reach(nullcontext(Cluster(threads))))
    names = [context.name for context in load_inputs(config).contexts]
    assert sorted(loaded) == sorted(names)
    # the weights of three rounds, to be trained and to be scored, and twice at the end
    assert len(set(read)) == 8
    assert len(read) <= 2 * 7
    assert not (run.path / "requests").exists()


def test_replies_come_in_the_order_of_requests_from_workers_that_change(
    labelled: Config, threads: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.LOOK_SECONDS", 0.1)
    config = changed(labelled, "order")
    weights = federate(config).load_checkpoint()
    assert weights is not None
    engine = DaskEngine(Cluster(threads), load_inputs(config).contexts)
    names = [entry.name for entry in engine.entries]
    for count in (2, 1, 2):
        threads.cluster.scale(count)
        while len(threads.nthreads()) != count:
            pass
        requests = [
            EvaluateRequest(**weights.address(name, 3), part="test", weights=weights.weights)
            for name in [*names, *reversed(names)]
        ]
        replies = list(engine.run(requests))
        assert [reply.client for reply in replies] == [request.client for request in requests]
        scores = {(reply.client, reply.metrics["dice"]) for reply in replies}
        assert len(scores) == len(names)
    engine.close()


def test_a_worker_of_another_version_is_refused(
    labelled: Config, threads: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hosting.Run(version="0.0.1 (results of version 0)")
    monkeypatch.setattr(DaskEngine, "new_run", staticmethod(lambda: old))
    with pytest.raises(SamfedError, match=r"expected 0.0.1 \(results of version 0\); install it"):
        federate(changed(labelled, "version"), connect=reach(nullcontext(Cluster(threads))))


def test_a_worker_that_does_not_see_the_coordinators_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamfedError) as caught:
        check_worker("1", "1", [tmp_path, tmp_path / "images"])
    assert str(caught.value) == (
        f"worker on {socket.gethostname()}: {tmp_path / 'images'} is not there; put data.root and "
        "cache.root on a file system that every worker sees under the same path"
    )
