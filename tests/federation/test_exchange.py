"""Clients with networks of their own: what crosses the border, and that rounds are repeatable."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config

from pipeline.config import Config, parse_config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, SamfedError
from pipeline.federation import exchange
from pipeline.federation.averaging import Averaging
from pipeline.federation.diagnostics import mean_dice
from pipeline.federation.exchange import Exchange, Message, Site, fusion_weight
from pipeline.federation.inputs import load_inputs
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.labelling.precompute import precompute
from pipeline.results.evaluate import evaluate
from pipeline.results.report import write_report
from pipeline.sam.finetune import finetune
from pipeline.segmentation.networks import build_model

NETWORKS: list[dict[str, Any]] = [
    {"architecture": "segformer", "encoder": "tu-lcnet_050", "encoder_depth": 5},
    {"architecture": "unet", "encoder": "tu-resnet10t", "encoder_depth": 3},
    {"architecture": "unet", "encoder": "tu-mobilenetv3_small_050", "encoder_depth": 3},
    {"architecture": "linknet", "encoder": "tu-regnetx_002", "encoder_depth": 5},
    {"architecture": "segformer", "encoder": "tu-mobilenetv4_conv_small_050", "encoder_depth": 5},
]
FUSION_TERMS = ("loss_seg", "loss_kl", "counted")  # as the report names them
CHANNELS = {"segformer": [16], "unet": [16, 8, 8], "linknet": [16, 8, 8]}


@pytest.fixture(scope="module")
def prepared(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Five clients of five backbones; a sixth network serves the server."""
    networks = [one | {"decoder_channels": CHANNELS[one["architecture"]]} for one in NETWORKS]
    config = tiny_config(
        tiny_images,
        tmp_path_factory.mktemp("exchange"),
        partition={"scheme": "iid", "clients": 5},
        model={"clients": networks},
        federate={"fusion_epochs": 1},
    )
    prepare(config, with_oracle=True)
    finetune(config)
    precompute(config)
    return config


def named(config: Config, name: str, **settings: Any) -> Config:
    changed = config.federate.model_copy(update={"name": name, **settings})
    return config.model_copy(update={"federate": changed})


def models(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.path / "models").iterdir()}


@pytest.mark.parametrize(
    "method", ["supervised", "sam_only", "sam_fed", "shuffled", "rc_rf", "fedmd", "oracle"]
)
def test_five_backbones_in_one_run(prepared: Config, method: str) -> None:
    config = named(prepared, method, method=method)
    run = federate(config)
    test = evaluate(config, run).test
    clients = list(load_partition(config.cache.root / "partition.json").clients)
    assert sorted(models(run)) == sorted(f"{name}.safetensors" for name in clients)
    assert list(test["clients"]) == clients
    assert len({len(content) for content in models(run).values()}) == 5  # five networks
    shape = (len(load_partition(config.cache.root / "partition.json").server.train), 2, 32, 32)
    logits = 2 * shape[0] * shape[1] * shape[2] * shape[3]
    for entry in run.history():
        for client in entry["clients"].values():
            spoke = method in ("sam_fed", "shuffled", "rc_rf", "fedmd")
            assert client["bytes_up"] == (logits if spoke else 0)
            assert client["bytes_down"] == (logits + 8 if spoke else 0)
            assert ("fusion_loss" in client) == spoke
            assert client["loss_kd"] == 0  # there is no broadcast model
        fuses = method in ("sam_fed", "shuffled", "rc_rf")
        assert set(entry["server"]) == ({"loss", *FUSION_TERMS} if fuses else set())
        for client in entry["clients"].values():
            assert fuses == all(f"fusion_{term}" in client for term in FUSION_TERMS)
    assert write_report([run]).path.is_file()


def test_only_logits_on_the_public_set_cross_the_border(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a site says is made without its images; what it hears is logits, a number and a seed."""
    config = named(prepared, "border", rounds=1)
    public = len(load_partition(config.cache.root / "partition.json").server.train)
    crossed: list[Any] = []
    speak, listen = Site.speak, Site.listen

    def spy_speak(self: Site, weights: Any, *, seed: int) -> Message:
        blind = dataclasses.replace(self._client, images=torch.zeros(0), masks=None)
        mine, self._client = self._client, blind
        message = speak(self, weights, seed=seed)
        self._client = mine
        crossed.append(message)
        return message

    def spy_listen(self: Site, weights: Any, answer: Message, number: int, *, seed: int) -> Any:
        assert type(seed) is int
        crossed.append(answer)
        return listen(self, weights, answer, number, seed=seed)

    monkeypatch.setattr(Site, "speak", spy_speak)
    monkeypatch.setattr(Site, "listen", spy_listen)
    federate(config)
    assert len(crossed) == 10
    assert [field.name for field in dataclasses.fields(Message)] == ["logits"]
    for message in crossed:
        assert isinstance(message, Message)
        assert message.logits.shape == (public, 2, 32, 32)
        assert message.logits.dtype == torch.float16


def test_stopping_after_a_round_changes_nothing(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federate(named(prepared, "whole"))
    real = Exchange.play

    def stop_in_round_two(self: Exchange, before: Any, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return real(self, before, number)

    monkeypatch.setattr(Exchange, "play", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        federate(named(prepared, "stopped"))
    monkeypatch.setattr(Exchange, "play", real)
    assert models(federate(named(prepared, "stopped"), mode="resume")) == models(whole)


def test_clients_of_one_kind_share_a_network_and_keep_their_weights(prepared: Config) -> None:
    two = prepared.model.model_copy(update={"clients": prepared.model.clients[1:3]})
    config = named(prepared, "two", rounds=1).model_copy(update={"model": two})
    data = load_inputs(config)
    kinds = Exchange(config, data, torch.device("cpu"))._models
    assert kinds[0] is kinds[2] is kinds[4]
    assert kinds[1] is kinds[3]
    assert kinds[0] is not kinds[1]
    run = federate(config)
    scores = run.history()[-1]["val"]["clients"]
    assert set(scores) == set(data.validation) != set()
    for index, client in enumerate(data.clients):
        if client.name not in scores:
            continue
        own = build_model(config, seed=0, network=config.network_of(index))
        own.load_state_dict(run.load_model(client.name))
        alone = mean_dice([(client.name, own, data.validation[client.name])], config)
        assert alone["dice"] == scores[client.name]
    weights = [run.load_model(data.clients[index].name) for index in (0, 2)]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_who_does_not_take_part_stays_as_it_was(prepared: Config) -> None:
    config = named(prepared, "partial", clients_per_round=2, rounds=1)
    run = federate(config)
    took_part = set(run.history()[0]["clients"])
    assert len(took_part) == 2
    started = federate(named(prepared, "idle", clients_per_round=2, rounds=1, local_steps=1))
    for name, content in models(run).items():
        same = content == models(started)[name]
        assert same == (name.removesuffix(".safetensors") not in took_part)


def test_a_client_that_predicts_nan_is_rejected_and_named(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = named(prepared, "nan", rounds=1)
    real, broken = exchange.public_logits, [2]
    calls: list[int] = []

    def maybe_broken(model: Any, inputs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 in broken:
            raise ValueError("logits of public image 0 hold NaN")
        return real(model, inputs)

    monkeypatch.setattr(exchange, "public_logits", maybe_broken)
    entry = federate(config).history()[0]
    rejected = "client_02: predictions rejected, logits of public image 0 hold NaN"
    assert rejected in entry["warnings"]
    assert entry["clients"]["client_02"]["bytes_up"] == 0
    assert "fusion_loss" not in entry["clients"]["client_02"]
    assert entry["clients"]["client_01"]["bytes_up"] > 0

    calls.clear()
    broken[:] = range(5)
    with pytest.raises(SamfedError, match="round 1: no client sent usable predictions"):
        federate(named(prepared, "all_nan"))


def test_rc_and_rf_wait_for_their_warm_up(prepared: Config) -> None:
    config = named(prepared, "warm", fusion_warmup_rounds=2, fusion_weight=7.0)
    assert [fusion_weight(config, number) for number in (1, 2, 3)] == [0.0, 0.0, 7.0]


def test_the_first_model_is_shared_with_runs_that_average(prepared: Config) -> None:
    """A start is a network's, not a method's: the folder holds one file for each network."""
    federate(named(prepared, "again", rounds=1))
    starts = prepared.cache.root / "starts"
    before = sorted(starts.iterdir())
    homogeneous = prepared.model.model_copy(update={"clients": ()})
    alone = named(prepared, "alone", rounds=1).model_copy(update={"model": homogeneous})
    federate(alone)
    assert sorted(starts.iterdir()) == before
    Averaging.check(alone)


def test_a_round_without_a_usable_update_ends_the_run(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = exchange.local_update, {"client_01"}

    def update(model: Any, weights: Any, client: Any, *rest: Any, **more: Any) -> Any:
        result = real(model, weights, client, *rest, **more)
        if client.name in broken:
            next(iter(result.weights.values())).fill_(float("nan"))
        return result

    monkeypatch.setattr(exchange, "local_update", update)
    config = named(prepared, "lost_one", method="sam_only", rounds=1)
    warnings = federate(config).history()[0]["warnings"]
    assert any(w.startswith("client_01: update rejected, 'encoder.") for w in warnings)
    broken |= {f"client_0{number}" for number in range(5)}
    with pytest.raises(SamfedError, match=r"round 1: no client has a usable update \(client_00: "):
        federate(named(prepared, "lost_all", method="sam_only", rounds=1))


def test_a_network_that_no_client_would_get_is_refused(prepared: Config) -> None:
    networks = (*prepared.model.clients, prepared.model.clients[0])
    model = prepared.model.model_copy(update={"clients": networks})
    with pytest.raises(ConfigError, match="found 6 networks for 5 clients"):
        federate(named(prepared, "six").model_copy(update={"model": model}))


def test_a_public_set_too_small_for_a_batch_is_refused(prepared: Config) -> None:
    """Batch norm cannot train on one image; a traceback in round 1 would come hours too late."""
    data = load_inputs(prepared)
    small = dataclasses.replace(
        data.server, images=data.server.images[:1], labels=data.server.labels[:1]
    )
    data = dataclasses.replace(data, server=small)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"D_p's training part has 1 image.*server_images"):
        Exchange(prepared, data, cpu)
    Exchange(named(prepared, "alone", method="sam_only"), data, cpu)  # does not exchange
    with pytest.raises(ConfigError, match=r"labelled_batch: found 1, .*greater than or equal to 2"):
        parse_config({"federate": {"labelled_batch": 1}}, source="test")
