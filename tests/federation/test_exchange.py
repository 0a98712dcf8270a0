"""Clients with networks of their own: what a method exchanges, and whose network is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import Config, NetworkConfig
from pipeline.data.partition import load_partition
from pipeline.errors import ConfigError
from pipeline.federation.client import mean_dice
from pipeline.federation.exchange import Exchange
from pipeline.federation.inputs import load_inputs, load_part
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.federation.views import ClientData, PublicSet
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.results.evaluate import evaluate
from pipeline.segmentation.networks import build_model

NETWORKS = tuple(
    NetworkConfig.model_validate(each)
    for each in (
        {
            "architecture": "segformer",
            "encoder": "tu-test_efficientnet",
            "encoder_depth": 5,
            "decoder_channels": [16],
        },
        {"encoder": "tu-resnet10t", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
        {"architecture": "linknet", "encoder": "tu-test_resnet", "encoder_depth": 5},
        {
            "architecture": "segformer",
            "encoder": "tu-test_convnext3",
            "encoder_depth": 5,
            "decoder_channels": [16],
        },
    )
)
FUSION_TERMS = ("loss_seg", "loss_kl", "counted")  # as the report names them


def named(
    config: Config, name: str, *, networks: tuple[NetworkConfig, ...] = NETWORKS, **settings: Any
) -> Config:
    """Return settings of a run called ``name``; four clients and the server differ in network."""
    changed = config.federate.model_copy(update={"name": name, "fusion_epochs": 1, **settings})
    model = config.model.model_copy(update={"clients": networks})
    return config.model_copy(update={"federate": changed, "model": model})


def models(run: RunFolder) -> dict[str, bytes]:
    assert not (run.path / "models").exists()
    paths = run.path.glob("clients/*/model.safetensors")
    return {path.parent.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("method", ["sam_only", "sam_fed", "rc_rf", "fedmd"])
def test_four_backbones_in_one_run(labelled: Config, method: str) -> None:
    config = named(labelled, method, method=method)
    run = federate(config)
    evaluate(config, run)
    partition = load_partition(config.cache.root / "partition.json")
    assert sorted(models(run)) == sorted(partition.clients)
    assert len({len(content) for content in models(run).values()}) == 4  # four networks
    logits = 2 * len(partition.server.train) * 2 * 32 * 32
    for entry in run.history():
        exchanged = method in ("sam_fed", "shuffled", "rc_rf", "fedmd")
        fuses = method in ("sam_fed", "shuffled", "rc_rf")
        for client in entry["clients"].values():
            assert client["bytes_up"] == client["bytes_down"] == (logits if exchanged else 0)
            assert ("fusion_loss" in client) == exchanged
            assert fuses == all(f"fusion_{term}" in client for term in FUSION_TERMS)
        assert set(entry["server"]) == ({"loss", *FUSION_TERMS} if fuses else set())
    captions = [example.caption for example in run.examples()]
    assert captions[0] == "server, image 1"
    assert captions[-4:] == [f"{name}, image 1" for name in partition.clients]


def test_clients_of_one_kind_share_a_network_and_keep_their_weights(labelled: Config) -> None:
    config = named(labelled, "two", networks=NETWORKS[:2], rounds=1)
    assert len(build_networks(config, torch.device("cpu"))) == 3  # with the server's
    run = federate(config)
    scores = run.history()[-1]["val"]["clients"]
    contexts = load_inputs(config).contexts
    assert set(scores) == {each.name for each in contexts if each.val} != set()
    for context in contexts:
        if context.val:
            own = build_model(config, seed=0, network=config.network_of(context.index))
            own.load_state_dict(run.load_model(context.name))
            part = load_part(context, "val")
            assert mean_dice(own, part, num_classes=1) == scores[context.name]
    weights = [run.load_model(contexts[index].name) for index in (0, 2)]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_who_does_not_take_part_stays_as_it_was(labelled: Config) -> None:
    runs = [
        federate(named(labelled, f"some_{steps}", clients_per_round=2, rounds=1, local_steps=steps))
        for steps in (1, 2)
    ]
    took_part = set(runs[0].history()[0]["clients"])
    assert len(took_part) == 2
    first, second = map(models, runs)
    for name, content in first.items():
        assert (content == second[name]) == (name not in took_part)


def test_the_first_model_is_shared_with_runs_that_average(labelled: Config) -> None:
    """A start is a network's, not a method's: the folder holds one file for each network."""
    federate(named(labelled, "again", rounds=1))
    starts = labelled.cache.root / "starts"
    before = sorted(starts.iterdir())
    assert len(before) == 5
    federate(named(labelled, "alone", networks=(), rounds=1))
    assert sorted(starts.iterdir()) == before


def test_a_network_that_no_client_would_get_is_refused(labelled: Config) -> None:
    with pytest.raises(ConfigError, match="found 5 networks for 4 clients"):
        federate(named(labelled, "five", networks=(*NETWORKS, NETWORKS[0])))


def test_a_public_set_too_small_for_a_batch_is_refused(labelled: Config) -> None:
    """Batch norm cannot train on one image; a traceback in round 1 would come hours too late."""
    one, mask = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32)
    public = PublicSet(one, mask, ClientData("server", one, truth=mask), ("a",))
    config = named(labelled, "small")
    with pytest.raises(ConfigError, match=r"D_p's training part has 1 image.*server_images"):
        Exchange(config, Workplace(config, public, {}), 4)
    alone = named(labelled, "alone", method="sam_only")  # does not exchange
    Exchange(alone, Workplace(alone, public, {}), 4)
