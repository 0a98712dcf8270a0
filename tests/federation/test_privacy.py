"""Differential privacy of clients: numbers worked out by hand, and all that leaves in a run."""

from __future__ import annotations

import math
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.stats import kstest, norm
from watched_engines import Watched, changed, models

from pipeline.config import Config, PrivacyConfig
from pipeline.errors import ConfigError, CorruptStoreError
from pipeline.federation.messages import AnyRequest, DescribeRequest, FitRequest, Reply
from pipeline.federation.privacy import (
    Noise,
    check_privacy,
    clipped,
    guarantee,
    noise_key,
    private_mean,
    private_update,
)
from pipeline.federation.runs import RunFolder
from pipeline.federation.schedule import participants
from pipeline.federation.server import federate
from pipeline.federation.updates import Updates
from pipeline.inference.card import model_card
from pipeline.params import parse_config
from pipeline.results.evaluate import evaluate
from pipeline.results.report import write_report
from pipeline.segmentation.networks import State

KEY = bytes(range(32))


def weights(a: list[float], b: list[float]) -> State:
    return {"a": torch.tensor(a), "b": torch.tensor([b]), "count": torch.tensor(3)}


# ----------------------------------------------------------------------- the mechanism


def test_clipping_by_hand() -> None:
    """A change of 3 and 4 has the norm 5, over all entries together."""
    before, after = weights([1.0], [2.0]), weights([4.0], [6.0])
    for limit, expected in ((1.0, (0.6, 0.8)), (5.0, (3.0, 4.0)), (10.0, (3.0, 4.0))):
        change = clipped(after, before, trained=["a", "b"], norm=limit)
        assert (change["a"].item(), change["b"].item()) == pytest.approx(expected, abs=1e-12)
    still = clipped(before, before, trained=["a", "b"], norm=1.0)
    assert [value.item() for value in still.values()] == [0, 0]


def test_the_mean_by_hand_where_there_is_hardly_any_noise(tmp_path: Path) -> None:
    """(0.6, 0.8) of one client and (0, 0.5) of another, over the three that were asked."""
    before = weights([1.0], [2.0])
    updates = Updates(tmp_path / "updates", before)
    updates.add("x", weights([4.0], [6.0]), 1)
    updates.add("y", weights([1.0], [2.5]), 1)
    settings = PrivacyConfig(mode="server", noise_multiplier=1e-9)
    mean = private_mean(
        updates, asked=3, trained=["a", "b"], settings=settings, noise=Noise(KEY, "-")
    )
    assert mean["a"].item() == pytest.approx(1 + 0.6 / 3, abs=1e-6)
    assert mean["b"].item() == pytest.approx(2 + 1.3 / 3, abs=1e-6)
    assert mean["count"].item() == 3
    assert [value.dtype for value in mean.values()] == [torch.float32, torch.float32, torch.int64]


def test_the_noise_is_normal_and_as_wide_as_it_says(tmp_path: Path) -> None:
    """z C = 1.5 in each client's update; 1.5 over the clients in their mean."""
    before = {"w": torch.zeros(200, 200)}
    settings = PrivacyConfig(mode="client", clip_norm=0.5, noise_multiplier=3.0)
    sent = [
        private_update(before, before, trained=["w"], settings=settings, noise=Noise(KEY, client))[
            "w"
        ].flatten()
        for client in ("x", "y")
    ]
    assert kstest(sent[0].numpy() / 1.5, "norm").pvalue > 0.01
    assert abs(float(torch.corrcoef(torch.stack(sent))[0, 1])) < 0.02
    updates = Updates(tmp_path / "updates", before)
    mean = private_mean(
        updates, asked=4, trained=["w"], settings=settings, noise=Noise(KEY, "the sum")
    )
    assert kstest(mean["w"].flatten().numpy() / (1.5 / 4), "norm").pvalue > 0.01


def test_the_same_change_has_the_same_noise_and_another_has_another() -> None:
    change = {"w": torch.zeros(10_000, dtype=torch.float64)}
    noise = Noise(KEY, "x")
    first = noise.into(change, 1.0)["w"]
    assert torch.equal(noise.into(change, 1.0)["w"], first)
    moved = {"w": change["w"].clone()}
    moved["w"][7] = 1e-300
    others = (
        noise.into(moved, 1.0),
        Noise(bytes(32), "x").into(change, 1.0),
        Noise(KEY, "y").into(change, 1.0),
        Noise(KEY, "x").into({"v": change["w"]}, 1.0),
    )
    for other in others:
        (value,) = other.values()
        assert abs(float(torch.corrcoef(torch.stack([first, value]))[0, 1])) < 0.04


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = noise_key(tmp_path)
    assert noise_key(tmp_path) == key
    assert noise_key(tmp_path / ".") == key
    assert len(set(key)) > 8
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o600)
    path.write_bytes(key[:9])
    with pytest.raises(CorruptStoreError, match=r"noise.key: found 9 bytes, expected 32; delete"):
        noise_key(tmp_path)


# ----------------------------------------------------------------------- the promise


def private(mode: str = "server", **sections: Any) -> Config:
    raw: dict[str, Any] = {"model": {"normalisation": "group"}, "privacy": {"mode": mode}}
    for name, value in sections.items():
        raw.setdefault(name, {}).update(value)
    return parse_config(raw, source="test")


def test_epsilon_of_the_literature() -> None:
    """Sigma = 3.7306 gives (1, 1e-5), by Balle and Wang (2018); four rounds need twice as much."""
    names = ["a", "b", "c"]
    for rounds in (1, 4):
        sigma = 3.730631634816464 * math.sqrt(rounds)
        config = private(privacy={"noise_multiplier": sigma})
        found = guarantee(config, names, rounds)
        assert found == {"epsilon": pytest.approx(1.0, abs=1e-6), "delta": 1e-5}
    assert guarantee(Config(), names, 4) == {}


def test_epsilon_solves_its_equation_and_renyis_bound_is_above() -> None:
    rounds, sigma, delta = 10, 2.0, 1e-6
    config = private(privacy={"noise_multiplier": sigma, "delta": delta})
    epsilon = guarantee(config, ["a"], rounds)["epsilon"]
    scale = sigma / math.sqrt(rounds)
    low, high = 1 / (2 * scale) - epsilon * scale, -1 / (2 * scale) - epsilon * scale
    assert norm.cdf(low) - math.exp(epsilon) * norm.cdf(high) == pytest.approx(delta, rel=1e-3)
    accountant = RdpAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(sigma), rounds))
    assert epsilon < accountant.get_epsilon(delta) < 1.1 * epsilon


def test_a_client_that_is_asked_in_fewer_rounds_loses_less() -> None:
    """The most that one client was drawn counts, which is no more than the number of rounds."""
    names = [f"client_{number}" for number in range(10)]
    config = private(federate={"clients_per_round": 2})
    drawn = [n for r in range(20) for n in participants(config, names, r + 1)]
    most = max(drawn.count(name) for name in names)
    assert 4 <= most < 20
    found = guarantee(config, names, 20)
    assert found == guarantee(private(), names, most)
    assert found["epsilon"] < guarantee(private(), names, 20)["epsilon"]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"normalisation": "batch"}}, "batch norm's statistics: set model.normalisation"),
        ({"federate": {"aggregation": "median"}}, "no bound for aggregation median: set federate"),
        ({"federate": {"aggregation": "krum"}}, "no bound for aggregation krum: set federate"),
        ({"model": {"clients": [{"encoder_depth": 3}]}}, "no bound for logits: leave model.clie"),
    ],
)
def test_what_no_argument_covers_is_refused(sections: dict[str, Any], reason: str) -> None:
    for mode in ("server", "client"):
        with pytest.raises(ConfigError, match=f"^privacy.mode {mode} has .*{reason}"):
            check_privacy(private(mode, **sections))
    check_privacy(private("none", **sections))
    check_privacy(
        private("client", federate={"compression": "int8", "server_optimizer": "fedadam"})
    )


def test_a_missing_accountant_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"run pip install 'samfed\[privacy\]'$"):
        check_privacy(private())
    check_privacy(private("none"))


# ----------------------------------------------------------------------- whole runs


def named(config: Config, name: str, *, privacy: dict[str, Any], **federate: Any) -> Config:
    """Return settings of a private run."""
    model = config.model.model_copy(update={"normalisation": "group"})
    found = changed(config.model_copy(update={"model": model}), name, **federate)
    model = found.model.model_copy(update={"normalisation": "group"})
    return found.model_copy(update={"privacy": PrivacyConfig(**privacy), "model": model})


def distance(one: RunFolder, other: RunFolder) -> float:
    pairs = [(v, other.load_model()[name]) for name, v in one.load_model().items()]
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))


def test_one_client_moves_the_model_by_no_more_than_its_share(labelled: Config) -> None:
    """By C / 4 where it sends nothing, whatever it sends else; nor does it silence the others."""
    quiet = {"mode": "server", "clip_norm": 0.01, "noise_multiplier": 1e-9}

    def spoil(request: AnyRequest, reply: Reply) -> Reply:
        if not isinstance(request, FitRequest) or reply.client != "site_b":
            return reply
        assert isinstance(reply.weights, dict)
        return replace(reply, weights={name: value + 2 for name, value in reply.weights.items()})

    def drop(request: AnyRequest, reply: Reply) -> Reply:
        return replace(reply, fault="-") if reply.client == "site_b" else reply

    whole, spoilt, without = (
        federate(named(labelled, name, privacy=quiet, rounds=1), connect=Watched(change).connect)
        for name, change in (("whole", lambda _, r: r), ("spoilt", spoil), ("without", drop))
    )
    assert 0.9 * 0.01 / 4 < distance(whole, without) <= 1.001 * 0.01 / 4
    assert 0.9 * 0.01 / 4 < distance(spoilt, without) <= 1.001 * 0.01 / 4
    assert distance(whole, spoilt) <= 1.001 * 0.02 / 4
    assert spoilt.history()[0]["warnings"] == []


@pytest.mark.parametrize("mode", ["server", "client"])
def test_nothing_but_noised_weights_leaves(labelled: Config, mode: str) -> None:
    watched = Watched()
    privacy = {"mode": mode, "noise_multiplier": 0.01, "clip_norm": 0.1}
    packed = {"compression": "int8"} if mode == "client" else {}
    config = named(labelled, mode, privacy=privacy, **packed)
    run = federate(config, connect=watched.connect)
    assert all(entry.flip_dice is None for entry in watched.entries)
    for request, reply in watched.seen:
        assert (reply.metrics, reply.logits, reply.features) == ({}, None, None)
        assert (reply.weights is not None) == isinstance(request, FitRequest)
        assert not isinstance(request, DescribeRequest)
        assert getattr(request, "part", None) is None

    found = [entry["privacy"] for entry in run.history()]
    names = [entry.name for entry in watched.entries]
    assert found == [guarantee(config, names, number) for number in (1, 2)]
    assert run.as_json() == {"run": str(run.path), "rounds": 2, "val_dice": None, **found[1]}
    promise = f"epsilon {found[1]['epsilon']:.3g} at delta 1e-05 for each client"
    assert run.text() == f"2 rounds, {promise}; {run.path}"
    spec = run.spec()
    assert (spec.training.epsilon, spec.training.delta) == (found[1]["epsilon"], 1e-5)
    card = model_card(run.spec(), run)
    assert f"* differential privacy of each client: epsilon {found[1]['epsilon']:.3g} at" in card
    assert "    model = with_group_norm(model)\n    model.load_state_dict(" in card
    evaluate(config, run)
    page = write_report([run]).path.read_text()
    assert f"differential privacy ({mode}): ε {found[1]['epsilon']:.3g} at δ 1e-05" in page


def test_a_crashed_server_repeats_the_noise_and_another_key_does_not(labelled: Config) -> None:
    privacy = {"mode": "server", "noise_multiplier": 0.01, "clip_norm": 0.1}
    config = named(labelled, "private", privacy=privacy, rounds=1)
    run = federate(config)
    whole = models(run)
    (run.path / "checkpoints" / "round_0001.safetensors").unlink()
    run.model_path.unlink()
    assert models(federate(config)) == whole
    (labelled.cache.root / "noise.key").unlink()
    again = federate(config, mode="restart")
    assert models(again) != whole
