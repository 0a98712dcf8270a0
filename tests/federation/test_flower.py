"""Stage two over Flower: the same bytes, with processes that die, and what is refused by name."""

from __future__ import annotations

import logging
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from conftest import LABELLED, call, copy_cache, fails, write_params
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity
from forks import Forks
from watched_engines import changed, models

from pipeline.config import Config
from pipeline.data.partition import ServerPart, load_partition, save_partition
from pipeline.data.public import export_public, import_public
from pipeline.errors import NetworkError, SamfedError
from pipeline.federation.audit import audit
from pipeline.federation.flower import engine as engine_module
from pipeline.federation.flower import fleet, node
from pipeline.federation.flower.engine import FlowerEngine, over_grid
from pipeline.federation.flower.fleet import Fleet
from pipeline.federation.flower.launch import launch
from pipeline.federation.flower.letters import Letter
from pipeline.federation.flower.link import Link
from pipeline.federation.flower.local import (
    Deployment,
    deployed,
    free_port,
    make_certificate,
    make_key,
)
from pipeline.federation.flower.site import Site, reply_to
from pipeline.federation.hosting import VERSION
from pipeline.federation.inputs import load_inputs
from pipeline.federation.messages import ClientEntry, EvaluateRequest
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.segmentation.networks import build_model, get_state
from pipeline.stores.plain_data import to_bytes

# Flower's own use of another library
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")

SITES = ("site_a", "site_b")
NGINX = shutil.which("nginx")


@pytest.fixture(scope="module")
def server(shared_pipeline: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of the server, with two clients."""
    folder = tmp_path_factory.mktemp("server")
    return changed(copy_cache(shared_pipeline, folder / "cache", LABELLED), "run", sites=SITES)


@pytest.fixture(scope="module")
def sites(server: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Settings of the two sites, each with a folder of its own."""
    folder = tmp_path_factory.mktemp("sites")
    export_public(server, folder / "public.samfed")
    return {name: make_site(folder / name, server, folder / "public.samfed") for name in SITES}


def make_site(folder: Path, server: Config, public: Path) -> Config:
    """Fill a site's folder with what it would have prepared and labelled by itself."""
    name, source, cache = folder.name, server.cache.root, folder / "cache"
    for store in (f"images/{name}", f"sam/{name}.zarr"):
        shutil.copytree(source / store, cache / store)
    whole = load_partition(source / "partition.json")
    part = whole.clients[name]
    own = {i: whole.images[i] for ids in (part.train, part.val, part.test) for i in ids}
    alone = {"server": ServerPart(), "clients": {name: part}, "images": own}
    save_partition(cache / "partition.json", whole.model_copy(update=alone))
    site = server.model_copy(update={"cache": server.cache.model_copy(update={"root": cache})})
    import_public(site, public)
    write_params(folder / "params.yaml", site)
    return site


@pytest.fixture(scope="module")
def deployment(
    sites: dict[str, Config], tmp_path_factory: pytest.TempPathFactory, forks: Forks
) -> Iterator[Deployment]:
    """A SuperLink, behind the proxy where there is nginx, and the sites' nodes."""
    folder = tmp_path_factory.mktemp("flower")
    with deployed(folder, nginx=NGINX, python=forks.python) as started:
        for name, site in sites.items():
            started.add_node(name, site.cache.root.parent / "params.yaml")
        yield started
    assert started.running() == []  # nor anything that Flower started by itself


def with_private_models(run: RunFolder, sites: dict[str, Config]) -> dict[str, bytes]:
    """The models of a run, those that stayed at the sites too."""
    found = models(run)
    for site in sites.values():
        found |= models(RunFolder(site.cache.root / "runs" / run.path.name))
    return found


def as_here(server: Config, sites: dict[str, Config], flower: RunFolder, *, own: bool) -> None:
    """Compare a run over Flower with the same one here (of dask: ``test_dask_engine``)."""
    here = federate(changed(server, f"here_{own}", own=own))
    assert with_private_models(flower, sites) == models(here)
    assert [entry["val"] for entry in flower.history()] == [e["val"] for e in here.history()]
    assert not list(flower.path.glob("clients/*"))  # what is private stays at its site


def test_here_and_on_flower_one_model_though_a_node_is_killed(
    server: Config, sites: dict[str, Config], deployment: Deployment
) -> None:
    def kill(what: str, done: int, total: int, note: str = "", /) -> None:
        if done == 1:
            deployment.kill(SITES[1])
            deployment.start_node(SITES[1])

    config = changed(server, "flower")
    flower = launch(config, deployment.link, progress=kill)
    as_here(server, sites, flower, own=False)


def test_networks_of_their_own_too_though_the_superlink_dies(
    server: Config,
    sites: dict[str, Config],
    deployment: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("pipeline.federation.flower.launch.GONE_SECONDS", 0.5)

    def kill(what: str, done: int, total: int, note: str = "", /) -> None:
        if done == 1:
            deployment.kill("superlink")

    config = changed(server, "died", own=True)
    with pytest.raises(NetworkError, match="run the same command to continue"):
        launch(config, deployment.link, progress=kill)
    deployment.start_superlink()
    params = write_params(tmp_path / "params.yaml", config)
    options = ("--superlink", deployment.link.address, "--root-certificates")
    result = call("federate", "--params", params, *options, deployment.certificate, "--resume")
    assert result.exit_code == 0, result.output
    as_here(server, sites, RunFolder(config.cache.root / "runs/died"), own=True)


def test_what_keeps_a_site_out_is_one_line(
    server: Config, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.federation.flower.node.JOIN_SECONDS", 0.0)
    params = write_params(tmp_path / "params.yaml", server)
    key, address = tmp_path / "stranger.key", deployment.fleet.address
    make_key(key)
    site = ("site", "run", "--params", params, "--name", "site_a", "--key", key)
    trusted = ("--root-certificates", deployment.certificate)
    assert "expected a key that is registered" in fails(1, *site, "--superlink", address, *trusted)
    other = ("--root-certificates", make_certificate(tmp_path / "other"))
    assert "expected one signed by the authority" in fails(1, *site, "--superlink", address, *other)
    nobody = f"127.0.0.1:{free_port()}"
    assert "no answer" in fails(1, *site, "--superlink", nobody, *trusted)
    run = ("federate", "--params", params, "--superlink", nobody, *trusted)
    assert "no answer" in fails(1, *run)
    assert "give one of them" in fails(2, *run, "--workers", 2)
    assert "--engine dask: found the options of flower" in fails(2, *run, "--engine", "dask")
    (tmp_path / "no.key").write_text("-")
    none = (*site[:-1], tmp_path / "no.key", "--superlink", address, *trusted)
    assert "expected a private key" in fails(2, *none)


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_the_proxy_lets_sites_reach_the_fleet_api_alone(deployment: Deployment) -> None:
    trusted = ssl.create_default_context(cafile=deployment.certificate)

    def status(path: str, address: str = deployment.fleet.address) -> int:
        with closing(HTTPSConnection(address, context=trusted, timeout=30)) as connection:
            connection.request("POST", path, headers={"Content-Length": "0"})
            return connection.getresponse().status

    assert status("/v1/control/list-runs", deployment.link.address) not in (403, 404)
    for path in ("control/list-runs", "runtime/push-object", "fleet/../control/list-runs"):
        assert status(f"/v1/{path}") == 403, path
    assert status("/v1/fleet/..%2fcontrol/list-runs") == 403
    assert status("/v1/fleet/nothing") == 404  # the SuperLink's own answer


# ----------------------------------------------------------------------- without a network

Answer = Callable[[Letter], Letter | Error | Exception | None]


class Sites:
    """A grid whose nodes answer at once, as the given functions do, or never."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = dict(enumerate(answers, start=1))
        self._waiting: dict[str, Message | Exception] = {}
        self.asked: list[tuple[int, str]] = []

    def get_node_ids(self) -> list[int]:
        return list(self._answers)

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            number, letter = message.metadata.dst_node_id, Letter.unpack(message.content)
            self.asked.append((number, letter.kind))
            answer = self._answers[number](letter)
            name = str(len(self.asked))
            message.metadata.__dict__["_message_id"] = name
            if isinstance(answer, Letter):
                self._waiting[name] = Message(answer.pack(), reply_to=message)
            elif isinstance(answer, Exception):
                self._waiting[name] = answer
            elif answer is not None:
                self._waiting[name] = Message(answer, reply_to=message)
        return [str(len(self.asked))]

    def pull_messages(self, names: list[str]) -> list[Message]:
        found = [self._waiting.pop(name) for name in names if name in self._waiting]
        for each in found:
            if isinstance(each, Exception):  # as Flower does where bytes are no message
                raise each
        return [each for each in found if isinstance(each, Message)]


def answering(sites: dict[str, Config], name: str) -> Callable[[Letter], Letter]:
    """Return a site that answers."""
    site = Site(name, sites[name])
    return lambda letter: reply_to(letter, site, lambda about: False)


def scoring(config: Config) -> EvaluateRequest:
    """A request to site_a."""
    weights = get_state(build_model(config, seed=0))
    return EvaluateRequest(
        client="site_a", round_number=1, state_round=0, part="val", weights=weights
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOIN_SECONDS", "LATE_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(engine_module, name, 0.1)
    for name in ("_run_id", "_task_id", "_node_id"):  # what a ServerApp's process is given
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_who_does_not_fit_is_named_before_the_first_round(
    server: Config, sites: dict[str, Config], quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    contexts = load_inputs(server).contexts
    one, two = (answering(sites, name) for name in SITES)

    def refused(*answers: Answer) -> str:
        with pytest.raises(SamfedError) as caught:
            FlowerEngine(Sites(answers), contexts)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    entries = FlowerEngine(Sites([two, one]), contexts).entries  # type: ignore[arg-type]
    assert [entry.name for entry in entries] == list(SITES)
    assert refused(one).startswith("site_b: no node within 0.1 s; found site_a; start one")
    twice = refused(one, two, one)
    assert twice.startswith("site_a: found two nodes of this name, expected one")
    assert "(nodes 1 and 3, as `flwr supernode register` numbered them)" in twice
    old = Letter("who", client="site_b", version="0.0.1 (results of version 0)")
    assert "site_b: found samfed 0.0.1" in refused(one, lambda letter: old)
    assert refused(one, lambda letter: Letter("")).startswith("site_b: no node")
    for entry in (
        ClientEntry("site_a", 9, 1),
        ClientEntry("site_b", 0, 1),
        ClientEntry("site_b", 10**400, 1),
        ClientEntry("site_b", 9, -1),
    ):

        def posing(letter: Letter, entry: ClientEntry = entry) -> Letter:
            said = {"body": to_bytes(entry)} if letter.kind == "entry" else {}
            return replace(two(letter), **said)

        assert refused(one, posing).startswith("site_b: it says of itself that it is ")
    damaged = partial(replace, client="site_b", version=VERSION, body=b"what")
    assert "site_b: what it says of itself is damaged" in refused(one, damaged)
    shout = Letter("who", client="\x1b[2J\nERROR: all is lost", version=VERSION)
    assert refused(one, lambda letter: shout).startswith("site_b: no node within 0.1 s; found  [2J")
    entries = FlowerEngine(Sites([one, two, one]), contexts, {1: "site_c", 3: "site_a"}).entries  # type: ignore[arg-type]
    assert [entry.name for entry in entries] == list(SITES)  # nor does who poses as it keep it out
    assert caplog.messages[-3:] == [
        "node 1 says that it is site_a, but its key is that of site_c",
        "site_b: node 2",
        "site_a: node 3",
    ]
    broken = refused(lambda letter: ValueError("no head"), one)  # nor does who sends no message
    assert broken.startswith("site_b: no node within 0.1 s; found node 1, which sends no message, ")
    larger = server.data.model_copy(update={"image_size": 64})
    other = server.model_copy(update={"data": larger})
    contexts = tuple(replace(each, config=other) for each in contexts)
    assert refused(one, two).startswith(
        "site_a: data.image_size: found 32 at the site, expected 64 as at the server; "
    )


@pytest.mark.parametrize(("compression", "mode"), [("int8", "client"), ("float16", "server")])
def test_fewer_bytes_and_privacy_change_nothing_on_the_way(
    server: Config, sites: dict[str, Config], quick: None, compression: str, mode: str
) -> None:
    """The same models, bytes and promise as here, where all places draw from one secret."""
    for place in (server, *sites.values()):
        (place.cache.root / "noise.key").write_bytes(b"k" * 32)
    privacy = server.privacy.model_copy(update={"mode": mode})
    model = server.model.model_copy(update={"normalisation": "group"})
    one, two = (
        changed(
            server.model_copy(update={"privacy": privacy, "model": model}),
            f"{where}_{mode}",
            compression=compression,
        )
        for where in ("here", "there")
    )
    here = federate(one)
    grid = Sites([answering(sites, name) for name in SITES])
    there = federate(two, connect=partial(over_grid, grid))  # type: ignore[arg-type]
    assert models(there) == models(here)
    few = 0.6 * sum(value.nbytes for value in here.load_model().values())
    for ours, theirs in zip(here.history(), there.history(), strict=True):
        assert theirs["privacy"] == ours["privacy"]
        assert theirs["privacy"]["epsilon"] > 0
        for name in SITES:
            report, other = theirs["clients"][name], ours["clients"][name]
            assert set(report) == {"images", "seconds", "bytes_up", "bytes_down"}
            assert report["bytes_up"] == other["bytes_up"] < few
            assert report["bytes_down"] == other["bytes_down"] < few
    assert audit(sites[SITES[0]], two.federate.name).totals()["fit"]["weights"] > 0


def test_a_request_that_a_node_lost_is_sent_again(
    server: Config, sites: dict[str, Config], quick: None
) -> None:
    """A node that was started again does not know it; a node that is away is waited for."""
    contexts = load_inputs(server).contexts
    site = answering(sites, "site_a")
    lost = iter([True, True, False])

    def forgetful(letter: Letter) -> Letter | Error | None:
        return None if letter.kind == "ask" and next(lost) else site(letter)

    grid = Sites([forgetful, answering(sites, "site_b")])
    engine = FlowerEngine(grid, contexts)  # type: ignore[arg-type]
    request = scoring(server)
    (reply,) = engine.run([request])
    assert (reply.client, reply.fault) == ("site_a", "")
    assert [kind for node, kind in grid.asked if node == 1] == [
        *("who", "entry", "ask", "busy", "ask", "busy", "ask")
    ]
    lost = iter([True] * 9)
    (reply,) = engine.run([request])
    assert reply.fault.startswith("its node lost the request 4 times")


def test_a_site_that_fails_is_a_fault_and_the_round_goes_on(
    server: Config, sites: dict[str, Config], quick: None
) -> None:
    contexts = load_inputs(server).contexts
    site = answering(sites, "site_a")
    answers: list[Letter | Error | Exception] = [
        Letter("ask", client="site_a", error="no space left"),
        Letter("ask", client="site_b"),
        Letter("ask", client="site_a", body=b"what"),
        Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "it broke\nhere"),
        KeyError("what"),
        ValueError("no head"),
    ]
    grid = Sites([lambda letter: answers.pop(0) if letter.kind == "ask" else site(letter)])
    engine = FlowerEngine(grid, contexts[:1])  # type: ignore[arg-type]
    request = scoring(server)
    faults = [reply.fault for reply in engine.run([request] * 6)]
    assert faults[0] == "no space left"
    assert "found an answer by 'site_b', expected its own" in faults[1]
    assert "its reply is damaged" in faults[2]
    assert "its ClientApp failed (it broke)" in faults[3]
    assert "its reply is no message ('what')" in faults[4]
    assert "its reply is no message (no head)" in faults[5]


def test_a_site_that_works_too_long_is_left_out(
    server: Config, sites: dict[str, Config], quick: None
) -> None:
    limited = changed(server, "limited", round_timeout_s=0.3)
    site = answering(sites, "site_a")

    def busy(letter: Letter) -> Letter | Error | None:
        if letter.kind == "busy":
            return replace(site(letter), at_work=True)
        return None if letter.kind == "ask" else site(letter)

    grid = Sites([busy])
    engine = FlowerEngine(grid, load_inputs(limited).contexts[:1])  # type: ignore[arg-type]
    (reply,) = engine.run([scoring(limited)])
    assert reply.timed_out
    assert [kind for _, kind in grid.asked].count("ask") == 1


def test_a_message_that_is_none_does_not_end_a_node(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may start runs at the SuperLink may send any bytes; a node drops them."""
    error = Message(
        Error(1, "why"), reply_to=Message(Letter("who").pack(), dst_node_id=1, message_type="query")
    )
    waiting = PullMessagesResponse(
        messages_list=[ProtoMessage()], message_object_trees=[ObjectTree(object_id="m")]
    )
    monkeypatch.setattr(fleet.FleetHttpClient, "PullMessages", lambda *_: waiting)
    connection = Fleet(Link(f"127.0.0.1:{free_port()}", insecure=True), None, tmp_path / "node")
    with closing(connection):
        for content in (
            b"what",
            b"Message 0\0what",
            Letter("who").pack().deflate(),
            error.deflate(),
        ):
            pieces = {"m": content}
            monkeypatch.setattr(fleet, "pull_objects", lambda *_, pieces=pieces, **__: pieces)
            with pytest.raises(ObjectPullError):
                connection.receive()


def test_a_node_says_that_it_is_at_work_as_often_as_it_is_asked(
    sites: dict[str, Config], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server would send a request again that takes long, and in the end give it up."""
    asked = [Letter(kind, about="r") for kind in ("ask", "busy", "busy", "busy")]
    free, replies = threading.Event(), list[Letter]()

    def answered(letter: Letter, site: Site, at_work: Callable[[str], bool]) -> Letter:
        if letter.kind == "busy":
            return replace(letter, at_work=at_work(letter.about))
        assert free.wait(30)
        return letter

    class Fleet:
        number = 1

        def __init__(self, *_: object) -> None:
            self.join = self.leave = self.close = self.beat = lambda: None

        def receive(self) -> Message | None:
            if len(replies) == 2:  # it has said twice that it is at work
                free.set()
            if len(replies) == 4:
                raise KeyboardInterrupt
            last = len(asked) == 1 and len(replies) < 3  # is asked once the request is answered
            if not asked or last:
                return None
            message = Message(asked.pop(0).pack(), dst_node_id=1, message_type="query")
            message.metadata.__dict__["_message_id"] = str(len(asked))
            return message

        def reply(self, reply: Message, seconds: float) -> None:
            replies.append(Letter.unpack(reply.content))

    monkeypatch.setattr(node, "Fleet", Fleet)
    monkeypatch.setattr(node, "reply_to", answered)
    with pytest.raises(KeyboardInterrupt):
        node.run_node(Site("alone", sites["site_a"]), Link("nowhere"), None)
    said = [(letter.kind, letter.at_work) for letter in replies]
    assert said == [("busy", True), ("busy", True), ("ask", False), ("busy", False)]
