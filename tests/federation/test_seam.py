"""What crosses between server and client, and that a client needs nothing else."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, write_params
from forks import Forks
from torch import Tensor
from watched_engines import Remote, Site, Watched, changed, models

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.errors import ConfigError, CorruptStoreError, NotFiniteError, SamfedError
from pipeline.federation.engines import in_process
from pipeline.federation.inputs import ClientContext
from pipeline.federation.messages import (
    AnyRequest,
    DistilRequest,
    EvaluateRequest,
    FitRequest,
    PredictRequest,
    Reply,
    Request,
)
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.federation.server import federate
from pipeline.federation.workplace import Workplace
from pipeline.segmentation.networks import State

CLIENT = "site_b"


# ----------------------------------------------------------------------- another process


@pytest.fixture(scope="module")
def site(
    shared_pipeline: Config, tmp_path_factory: pytest.TempPathFactory, forks: Forks
) -> Iterator[tuple[Site, Path]]:
    """A process that has one client's stores and D_p's, and where it runs."""
    folder, cache = tmp_path_factory.mktemp("site"), shared_pipeline.cache.root
    for store in ("images/server", f"images/{CLIENT}", "sam/server.zarr", f"sam/{CLIENT}.zarr"):
        shutil.copytree(cache / store, folder / "cache" / store)
    process = Site(folder, forks)
    yield process, folder
    process.close()


@pytest.mark.parametrize("own", [False, True])
def test_a_client_elsewhere_gives_the_same_bytes(
    labelled: Config, site: tuple[Site, Path], own: bool
) -> None:
    process, folder = site
    here = federate(changed(labelled, "here", own=own))

    @contextmanager
    def connect(contexts: Sequence[ClientContext], workplace: Workplace) -> Iterator[Remote]:
        (context,) = (each for each in contexts if each.name == CLIENT)
        cache = context.config.cache.model_copy(update={"root": Path("cache")})
        config = context.config.model_copy(update={"cache": cache})
        with in_process(contexts, workplace) as others:
            yield Remote(process, replace(context, config=config), others)

    name = f"there_{own}"
    there = federate(changed(labelled, name, own=own), connect=connect)
    brought = folder / "cache" / "runs" / name
    if own:
        assert not (there.path / "models").exists()
        assert not (there.path / "examples.safetensors").exists()
    assert not (there.path / "clients" / CLIENT).exists()
    private = brought / "clients" / CLIENT
    assert (private / "examples.safetensors").is_file()
    assert not list(private.glob("distilled*"))
    if own:
        (there.path / "clients" / CLIENT).mkdir()
        shutil.copy(private / "model.safetensors", there.path / "clients" / CLIENT)
    assert models(there) == models(here)
    scores = [[entry["val"]["dice"] for entry in run.history()] for run in (here, there)]
    assert scores[0] == scores[1]


def test_a_context_names_nobody_elses_images(labelled: Config) -> None:
    partition = load_partition(labelled.cache.root / "partition.json")
    contexts: list[ClientContext] = []

    def connect(found: Sequence[ClientContext], workplace: Workplace) -> Any:
        contexts.extend(found)
        return in_process(found, workplace)

    federate(changed(labelled, "contexts", rounds=1), connect=connect)
    for context in contexts:
        text = context.to_json().decode()
        assert ClientContext.from_json(context.to_json()) == context
        for name in partition.clients:
            for image_id in (i for ids in partition.splits(name).values() for i in ids):
                assert (json.dumps(image_id) in text) == (name == context.name)


# ----------------------------------------------------------------------- what crosses


@pytest.mark.parametrize("method", ["sam_fed", "fedmd"])
def test_only_logits_on_the_public_set_cross_between_own_networks(
    labelled: Config, method: str
) -> None:
    """No weights, and no tensor of another shape, ever leave a client or reach it."""
    watched = Watched()
    federate(changed(labelled, method, own=True, method=method), connect=watched.connect)
    public = len(load_partition(labelled.cache.root / "partition.json").server.train)
    tensors = [
        value
        for pair in watched.seen
        for message in pair
        for value in vars(message).values()
        if isinstance(value, Tensor)
    ]
    assert len(tensors) == 2 * 4 * 2  # rounds, clients, ways
    assert all(tensor.shape == (public, 2, 32, 32) for tensor in tensors)
    assert all(tensor.dtype == torch.float16 for tensor in tensors)
    assert all(getattr(m, "weights", None) is None for pair in watched.seen for m in pair)


def test_the_servers_checkpoint_holds_no_clients_weights(labelled: Config) -> None:
    run = federate(changed(labelled, "own", own=True))
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert [field.name for field in fields(checkpoint)] == [
        "round",
        "weights",
        "client_rounds",
        "partition",
        "fingerprint",
        "moments",
        "average",
    ]
    server = (run.path / "checkpoints" / "round_0002.safetensors").stat().st_size
    private = sorted((run.path / "clients" / CLIENT).glob("round_*"))
    assert [path.name for path in private] == ["round_0001.safetensors", "round_0002.safetensors"]
    assert abs(private[0].stat().st_size - server) > 1000  # another network


# ----------------------------------------------------------------------- crashes


@pytest.mark.parametrize("own", [False, True])
def test_a_server_that_stops_anywhere_repeats_the_round_to_the_same_bytes(
    labelled: Config, own: bool
) -> None:
    whole = models(federate(changed(labelled, "whole", own=own)))
    # among the first fits; among the second round's; while models are scored or kept
    for stop in (6, 17, 31) if own else (2, 9, 15):
        stopped = Watched()

        def crash(request: AnyRequest, reply: Reply, stopped: Watched = stopped) -> Reply:
            if len(stopped.seen) == stop:  # noqa: B023
                raise KeyboardInterrupt  # the client has answered, and nobody heard
            return reply

        stopped.change = crash
        config = changed(labelled, f"stopped_{stop}", own=own)
        with pytest.raises(KeyboardInterrupt):
            federate(config, connect=stopped.connect)
        assert models(federate(config)) == whole


def test_the_checkpoint_before_a_damaged_one_is_enough(labelled: Config) -> None:
    config = changed(labelled, "damaged", own=True, rounds=4)
    run = federate(config)
    whole = models(run)
    (run.path / "checkpoints" / "round_0004.safetensors").unlink()
    for path in run.path.glob("clients/*/model.safetensors"):
        path.unlink()
    assert models(federate(config)) == whole
    assert [entry["round"] for entry in run.history()] == [1, 2, 3, 4]


def test_lost_private_state_is_named(labelled: Config) -> None:
    config = changed(labelled, "lost", own=True)
    run = federate(config)
    path = run.path / "clients" / CLIENT / "round_0002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptStoreError) as damaged:
        federate(config)
    assert str(damaged.value) == (
        f"{path}: damaged (sha256 differs); delete it and run `samfed federate --restart`"
    )
    path.unlink()
    with pytest.raises(SamfedError) as caught:
        federate(config)
    assert str(caught.value) == (
        f"{path}: found nothing, expected the client's own state of round 2; "
        "run `samfed federate --restart`"
    )


def test_a_disk_that_is_full_at_a_checkpoint(
    labelled: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the file; the checkpoint before it is whole, and enough to go on from."""
    config = changed(labelled, "full")
    params = write_params(tmp_path / "params.yaml", config)
    run, real = RunFolder(labelled.cache.root / "runs" / "full"), RunFolder.save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> None:
        if checkpoint.round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            real(folder, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_checkpoint", save_checkpoint)
        result = call("federate", "--params", params)
    assert result.exit_code == 1
    path = run.path / "checkpoints" / "round_0002.safetensors"
    assert f"error: {path}: File too large; " in result.stderr
    assert result.stderr.count("error: ") == 1
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "round_0000.safetensors",
        "round_0001.safetensors",
    ]
    assert models(federate(config, mode="resume")) == models(federate(changed(labelled, "whole")))


# ----------------------------------------------------------------------- updates that do not count


def spoil(change: Any) -> Watched:
    """Return clients of whom one sends other weights than its own, as ``change`` makes them."""

    def spoilt(request: AnyRequest, reply: Reply) -> Reply:
        if isinstance(request, FitRequest) and reply.client == CLIENT:
            assert reply.weights is not None
            return replace(reply, weights=change(dict(reply.weights)))
        return reply

    return Watched(spoilt)


def first(weights: State, value: Any) -> State:
    """Replace a network's first entry."""
    return weights | {next(iter(weights)): value(next(iter(weights.values())))}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: first(w, lambda v: v[:1]), "has shape"),
        (lambda w: first(w, lambda v: v.double()), "is torch.float64, expected torch.float32"),
        (lambda w: dict(list(w.items())[1:]), "missing"),
        (lambda w: w | {"more": torch.zeros(1)}, "'more' is unexpected"),
        (lambda w: first(w, lambda v: v * torch.nan), "is not finite"),
        (lambda w: first(w, lambda v: torch.full_like(v, 1e30)), "it changes the model by"),
        (lambda w: first(w, lambda v: v + 2.0), "times the median of the round's, more than 20"),
    ],
    ids=["shape", "dtype", "missing", "unexpected", "nan", "1e30", "median"],
)
def test_an_update_that_does_not_fit_is_rejected_and_named(
    labelled: Config, change: Any, reason: str
) -> None:
    """The round goes on as if the client had not taken part."""
    run = federate(changed(labelled, "spoilt", rounds=1), connect=spoil(change).connect)
    (warning,) = (w for w in run.history()[0]["warnings"] if "rejected" in w)
    assert warning.startswith(f"{CLIENT}: update rejected, ")
    assert reason in warning
    silent = Watched(lambda request, reply: replace(reply, fault="-") if _is(reply) else reply)
    without = federate(changed(labelled, "without", rounds=1), connect=silent.connect)
    assert models(run) == models(without)
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert CLIENT not in checkpoint.client_rounds
    assert not (run.path / "updates").exists()


def test_who_trains_is_not_rejected_because_most_do_not(labelled: Config) -> None:
    """Most updates are what was received, so that the median of their norms is 0."""

    def idle(request: AnyRequest, reply: Reply) -> Reply:
        if isinstance(request, FitRequest) and reply.client != CLIENT:
            return replace(reply, weights=request.weights)
        return reply

    run = federate(changed(labelled, "idle", rounds=1), connect=Watched(idle).connect)
    assert not [w for w in run.history()[0]["warnings"] if "rejected" in w]
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert CLIENT in checkpoint.client_rounds


@pytest.mark.parametrize(
    ("change", "found"),
    [({"client": "site_a"}, "site_a in round 1"), ({"round_number": 0}, f"{CLIENT} in round 0")],
)
def test_a_reply_in_anothers_name_or_to_another_round_is_rejected(
    labelled: Config, change: dict[str, Any], found: str
) -> None:
    forged = Watched(lambda request, reply: replace(reply, **change) if _is(reply) else reply)
    run = federate(changed(labelled, "forged", rounds=1), connect=forged.connect)
    warnings = [w for w in run.history()[0]["warnings"] if "rejected" in w]
    assert warnings == [f"{CLIENT}: update rejected, it answers as {found}"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 10**400}, "it counts 1000000"),
        ({"images": -1}, "it counts -1 images"),
        ({"seconds": math.nan}, "nan s of work"),
        ({"metrics": {"<b>": 1.0}}, "it names a number '<b>'"),
        ({"metrics": dict.fromkeys(map("n{}".format, range(2000)), 1.0)}, "it has 2000 numbers"),
        ({"fault": "a\nERROR: b\x1b[2J" + "c" * 9999}, "a ERROR: b [2Jccc"),
    ],
    ids=["huge", "negative", "seconds", "name", "many", "fault"],
)
def test_a_reply_that_no_samfed_gives_is_rejected_in_one_line(
    labelled: Config, change: dict[str, Any], reason: str
) -> None:
    """It stops no run, and writes nothing but one line of its own to the log and the history."""
    odd = Watched(lambda request, reply: replace(reply, **change) if _is(reply) else reply)
    run = federate(changed(labelled, "odd", rounds=1), connect=odd.connect)
    (warning,) = (w for w in run.history()[0]["warnings"] if "rejected" in w)
    assert warning.startswith(f"{CLIENT}: update rejected, ")
    assert reason in warning
    assert len(warning) < 600
    assert warning.isprintable()
    assert len(run.history()[0]["clients"][CLIENT]) < 100


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"dice": math.nan}},
        {"metrics": {"dice": 7.0}},
        {"metrics": {}},
        {"images": 9999},
    ],
)
def test_a_score_that_cannot_be_does_not_count(
    labelled: Config, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def boast(request: AnyRequest, reply: Reply) -> Reply:
        scored = isinstance(request, EvaluateRequest) and request.part and reply.client == CLIENT
        return replace(reply, **change) if scored else reply

    run = federate(changed(labelled, "boast", rounds=1), connect=Watched(boast).connect)
    val = run.history()[0]["val"]
    assert sorted(val["clients"]) == ["site_c", "site_d"]  # site_a has none
    assert min(val["clients"].values()) <= val["dice"] <= max(val["clients"].values())
    assert f"{CLIENT}: validation score rejected, " in caplog.text


def test_a_client_rejected_for_long_goes_on_from_its_last_accepted_round(labelled: Config) -> None:
    watched = spoil(lambda w: w if watched.seen[-1][0].round_number == 1 else {})
    run = federate(changed(labelled, "long", rounds=6), connect=watched.connect)
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.client_rounds == {"site_a": 6, "site_b": 1, "site_c": 6, "site_d": 6}
    kept = sorted(path.name for path in (run.path / "clients" / CLIENT).glob("round_*"))
    assert kept == ["round_0001.safetensors", "round_0006.safetensors"]


def _is(reply: Reply) -> bool:
    return reply.client == CLIENT and reply.weights is not None


def test_a_round_without_a_usable_update_ends_the_run(labelled: Config) -> None:
    wild = {"method": "sam_only", "learning_rate": 1e30, "pretrain_steps": 0}
    for own in (False, True):
        config = changed(labelled, f"wild_{own}", own=own, **wild)
        with pytest.raises(SamfedError) as caught:
            federate(config)
        message = str(caught.value)
        assert message.startswith("round 1: no client sent a usable update, expected 1 (site_a: ")
        assert message.count(" is not finite; site_") == 3  # every client is named
        assert message.endswith(
            " is not finite); lower federate.learning_rate or federate.min_clients"
        )


def faulty(times: int) -> Watched:
    """Return clients of whom one has no update in round 2, the first so many times it is asked."""
    asked: list[AnyRequest] = []

    def change(request: AnyRequest, reply: Reply) -> Reply:
        if not isinstance(request, FitRequest) or (reply.client, reply.round_number) != (CLIENT, 2):
            return reply
        asked.append(request)
        return replace(reply, fault="no disk") if len(asked) <= times else reply

    return Watched(change)


@pytest.mark.parametrize("own", [False, True])
def test_a_round_with_too_few_clients_is_repeated_once(
    labelled: Config, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    """Then the run stops with its last checkpoint, and goes on from there to the same bytes."""
    whole = models(federate(changed(labelled, "whole", own=own)))
    strict = changed(labelled, "strict", own=own, min_clients=4)
    reason = (
        "round 2: 3 of 4 clients sent a usable update, expected 4 "
        f"({CLIENT}: update rejected, no disk); "
        "lower federate.learning_rate or federate.min_clients"
    )
    with pytest.raises(SamfedError) as caught:
        federate(strict, connect=faulty(2).connect)
    assert str(caught.value) == reason
    assert f"{reason}; the round is repeated" in caplog.messages
    run = federate(strict, mode="resume", connect=faulty(1).connect)
    assert models(run) == whole
    assert len(run.history()) == 2


def test_a_round_with_enough_clients_left_goes_on(labelled: Config) -> None:
    watched = faulty(1)
    federate(changed(labelled, "tolerant", min_clients=3), connect=watched.connect)
    assert sum(isinstance(request, FitRequest) for request, _ in watched.seen) == 8


@pytest.mark.parametrize("kind", [PredictRequest, DistilRequest, FitRequest])
def test_who_does_not_answer_in_time_is_left_out_of_the_round(
    labelled: Config, kind: type[Request]
) -> None:
    """Nobody waits for it twice, and the next round builds on what it had before."""
    own = kind is not FitRequest

    def late(request: AnyRequest, reply: Reply) -> Reply:
        misses = (request.client, request.round_number) == (CLIENT, 2)
        return request.unanswered(0.5) if misses and isinstance(request, kind) else reply

    watched = Watched(late)
    run = federate(changed(labelled, "late", own=own, rounds=3), connect=watched.connect)
    assert [entry["rejected"] for entry in run.history()] == [[], [CLIENT], []]
    fault = "update rejected, no answer within 0.5 s (federate.round_timeout_s)"
    assert f"{CLIENT}: {fault}" in run.history()[1]["warnings"]
    mine = [request for request, _ in watched.seen if request.client == CLIENT]
    second = [request for request in mine if request.round_number == 2]
    assert [type(r) for r in second if not isinstance(r, EvaluateRequest)][-1] is kind
    third = [request for request in mine if request.round_number == 3]
    assert third[0].state_round == 1
    assert third[-1].state_round == 3


def test_a_client_of_this_process_is_waited_for(
    labelled: Config, caplog: pytest.LogCaptureFixture
) -> None:
    federate(changed(labelled, "here", rounds=1, round_timeout_s=1e-6))
    assert caplog.messages[0] == (
        "federate.round_timeout_s: no client can be stopped in this process, so it is waited for; "
        "use --workers, --scheduler or --superlink"
    )


def test_hostile_clients_are_left_out(labelled: Config) -> None:
    """One of four sends what does not go far enough to be rejected, and Krum takes another's."""
    larger = spoil(lambda w: {k: v * 1.01 if v.is_floating_point() else v for k, v in w.items()})
    with pytest.raises(ConfigError) as caught:
        federate(changed(labelled, "few", aggregation="krum"))
    assert str(caught.value) == (
        "federate.aggregation krum: found 4 clients in a round, expected at least 5 for "
        "federate.byzantine 1; take more clients, a smaller byzantine, or median"
    )
    with pytest.raises(ConfigError, match="min_clients: found 5, expected at most 2, the clients"):
        federate(changed(labelled, "few", min_clients=5, clients_per_round=2))
    settings = {"aggregation": "multi_krum", "byzantine": 0, "rounds": 1}
    honest = federate(changed(labelled, "honest", **settings))
    assert "chosen" not in honest.history()[0]["clients"][CLIENT]
    krum = changed(labelled, "krum", aggregation="krum", byzantine=0, rounds=1)
    reports = federate(krum, connect=larger.connect).history()[0]["clients"]
    assert sum(report["chosen"] for report in reports.values()) == 1
    assert not reports[CLIENT]["chosen"]


def test_a_first_model_that_diverges_is_not_kept(labelled: Config) -> None:
    with pytest.raises(NotFiniteError, match=r"not written: '[\w.]+' is not finite; lower the le"):
        federate(changed(labelled, "wild", pretrain_learning_rate=1e30))
    assert list((labelled.cache.root / "starts").glob("*")) == []


def test_predictions_that_cannot_be_used_are_rejected_and_named(labelled: Config) -> None:
    def broken(names: set[str]) -> Watched:
        def change(request: AnyRequest, reply: Reply) -> Reply:
            if reply.logits is None or reply.client not in names:
                return reply
            return replace(reply, logits=reply.logits * torch.nan)

        return Watched(change)

    config = changed(labelled, "nan", own=True, rounds=1)
    entry = federate(config, connect=broken({CLIENT}).connect).history()[0]
    rejected = f"{CLIENT}: predictions rejected, logits of public image 0 hold NaN"
    assert rejected in entry["warnings"]
    assert "fusion_loss" not in entry["clients"][CLIENT]
    assert "fusion_loss" in entry["clients"]["site_a"]
    names = {"site_a", "site_b", "site_c", "site_d"}
    with pytest.raises(SamfedError, match="round 1: no client sent usable predictions, "):
        federate(changed(labelled, "all_nan", own=True), connect=broken(names).connect)
