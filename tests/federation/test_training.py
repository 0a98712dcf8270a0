"""One client's update: what every method shares, and what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.federation import local_update as training
from pipeline.federation import targets
from pipeline.federation.agreement import Calibration, PseudoLabel, agree
from pipeline.federation.local_update import (
    LocalResult,
    LocalTask,
    audit,
    audited_dice,
    cosine,
    local_update,
    proximal_loss,
    train_on_server,
)
from pipeline.federation.streams import Streams
from pipeline.federation.targets import TARGETS, Learner, sources_of
from pipeline.federation.views import ClientData, PublicSet, Sampling, draw_views
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.params import parse_config
from pipeline.segmentation.networks import build_model, get_state, predict_probabilities


def settings(**federate: Any) -> Config:
    """Return settings under which an update takes two steps."""
    steps = {"local_steps": 2, "labelled_batch": 3, "unlabelled_batch": 3, "threads": 1}
    raw = {
        "data": {"image_size": 32},
        "model": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
        "federate": steps | federate,
    }
    return parse_config(raw, source="test")


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 of a bright disc, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centre = torch.randint(10, 22, (count, 2, 1, 1), generator=generator)
    mask = ((rows - centre[:, 0]) ** 2 + (cols - centre[:, 1]) ** 2 < 50).to(torch.uint8)
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
    return (mask[:, None] * 150 + noise).to(torch.uint8), mask


def make_data() -> tuple[PublicSet, ClientData]:
    images, labels = blobs(6, 0)
    calibration, truth = blobs(6, 1)
    sure = torch.full(truth.shape, 240, dtype=torch.uint8)
    known = ClientData("server", calibration, truth, sure, truth)
    public = PublicSet(images, labels, known, tuple("abcdef"))
    own, masks = blobs(8, 2)
    return public, ClientData("one", own, masks, torch.full(masks.shape, 240, dtype=torch.uint8))


def update(
    method: str,
    *,
    seed: int = 5,
    client: ClientData | None = None,
    calibration: Calibration | None = None,
    **federate: Any,
) -> LocalResult:
    """Return an update of a first model, which is the broadcast one too."""
    config = settings(method=method, **federate)
    public, data = make_data()
    workplace = Workplace(config, public, build_networks(config, torch.device("cpu")))
    weights = get_state(build_model(config, seed=0))
    task = LocalTask(
        weights=weights,
        calibration=calibration or Calibration(),
        learning_rate=1e-3,
        unlabelled_weight=1.0,
        streams=Streams(seed),
    )
    model = workplace.loaded(config.model, weights)
    return local_update(model, public, client or data, task, config=config)


def test_a_frozen_network_serves_many_clients() -> None:
    """It is loaded once for the same weights, is never trained, and is not the one that is."""
    config = settings()
    workplace = Workplace(config, make_data()[0], build_networks(config, torch.device("cpu")))
    weights = get_state(build_model(config, seed=1))
    frozen = workplace.frozen(config.model, weights)
    trained = workplace.loaded(config.model, get_state(build_model(config, seed=2)))
    assert workplace.frozen(config.model, weights) is frozen is not trained
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for name, value in get_state(frozen).items():
        assert torch.equal(value, weights[name])
    other = get_state(build_model(config, seed=3))
    assert workplace.frozen(config.model, other) is frozen
    assert torch.equal(next(iter(get_state(frozen).values())), next(iter(other.values())))


@pytest.mark.parametrize("architecture", ["unet", "fpn", "linknet", "deeplabv3plus"])
def test_the_same_bytes_whatever_was_drawn_before(architecture: str) -> None:
    """Some architectures have dropout, which draws from torch's global generator."""
    config = parse_config(
        {
            "data": {"image_size": 64},
            "model": {
                "architecture": architecture,
                "encoder_depth": 5,
                "decoder_channels": [16, 16, 8, 8, 8],
            },
            "federate": {
                "method": "supervised",
                "local_steps": 1,
                "labelled_batch": 2,
                "unlabelled_batch": 2,
                "threads": 1,
            },
        },
        source="test",
    )
    public, client = make_data()
    states = []
    for drawn in (0, 7):
        torch.rand(drawn)
        model = build_model(config, seed=0)
        task = LocalTask(get_state(model), Calibration(), 1e-3, 1.0, Streams(5))
        states.append(local_update(model, public, client, task, config=config).weights)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ({"architecture": "fpn", "encoder_depth": 4}, 64, "answers with (2, 128, 128)"),
        ({"architecture": "linknet", "encoder_depth": 5}, 48, "cannot take 48 px"),
        ({"encoder_depth": 4, "decoder_channels": [8, 8]}, 64, "found 2 values, expected one"),
        ({"encoder": "no_such_encoder"}, 64, "cannot be built"),
    ],
)
def test_models_that_do_not_fit_are_named(model: dict[str, Any], size: int, message: str) -> None:
    config = parse_config({"data": {"image_size": size}, "model": model}, source="test")
    with pytest.raises(ConfigError) as error:
        build_model(config, seed=0)
    assert message in str(error.value)


METHODS = [
    "supervised", "adabn", "fedavg_ssl", "semifl", "fed_mean_teacher", "sam_only", "sam_soft",
    "sam_fed", "oracle",
]  # fmt: skip


def test_a_pure_function_of_its_arguments() -> None:
    first, again, other = update("sam_fed"), update("sam_fed"), update("sam_fed", seed=6)
    for name, value in first.weights.items():
        assert torch.equal(value, again.weights[name])
    assert any(not torch.equal(v, other.weights[n]) for n, v in first.weights.items())
    assert first.metrics == again.metrics


def test_every_method_sees_the_same_labelled_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    real = training.supervised_loss
    for method in METHODS:
        batches: list[Tensor] = []

        def record(
            logits: Tensor, target: Tensor, batches: list[Tensor] = batches, **rest: Any
        ) -> Tensor:
            batches.append(target)
            return real(logits, target, **rest)

        monkeypatch.setattr(training, "supervised_loss", record)
        update(method)
        seen[method] = batches
    assert all(len(batches) == 2 for batches in seen.values())
    for batches in seen.values():
        for mine, reference in zip(batches, seen["supervised"], strict=True):
            assert torch.equal(mine, reference)


def test_every_unlabelled_method_sees_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    real = training.draw_views
    for method in METHODS[1:]:
        views: list[Tensor] = []

        def record(*arguments: Any, views: list[Tensor] = views) -> Any:
            drawn = real(*arguments)
            views.append(drawn.strong)
            return drawn

        monkeypatch.setattr(training, "draw_views", record)
        update(method)
        seen[method] = views
    for views in seen.values():
        for mine, reference in zip(views, seen["oracle"], strict=True):
            assert torch.equal(mine, reference)


def test_a_rounds_targets_are_of_the_received_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are made once, before the steps, and move with the views of their images."""
    seen: list[Any] = []
    real = training.draw_views

    def record(*arguments: Any) -> Any:
        seen.append((arguments[0], real(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(training, "draw_views", record)
    result = update("sam_fed", local_steps=2, unlabelled_batch=3)
    data = seen[0][0]
    assert all(client is data for client, _ in seen)
    config = settings()
    both = sources_of(build_model(config, seed=0), make_data()[1])
    made = agree(both, config=config.agreement)
    (drawn,) = data.weight.flatten(1).any(dim=1).nonzero(as_tuple=True)
    assert 3 <= len(drawn) <= 6, "only those of the round's batches are labelled"
    expected = (made.target[:, 1] * 255).round().to(torch.uint8)
    assert torch.equal(data.target[drawn, 0], expected[drawn])
    assert torch.equal(data.weight[drawn], (made.weight * 255).round().to(torch.uint8)[drawn])
    assert result.metrics["agreement"] == pytest.approx(float(both.dice[drawn].mean()))
    for _, views in seen:
        assert views.target.shape == (3, 2, 32, 32)
        assert torch.allclose(views.target.sum(dim=1), torch.ones(3, 32, 32))
        assert bool(views.weight.flatten(1).any(dim=1).all()), "every image drawn has a target"
        # the image and the target have the same geometry
        bright = views.weak.mean(dim=1) > 0.5
        inside, outside = (views.target[:, 1][bright == k].mean() for k in (True, False))
        assert float(inside) > float(outside) + 0.3


def test_unlabelled_images_count_by_what_the_model_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that promises all of a Dice at the site learns from the server's set alone."""
    for expected in (0.0, 0.0625, 1.0):

        def lacks(sources: Any, calibration: Any, expected: float = expected) -> Tensor:
            return torch.full((len(sources.dice),), 0.1 * expected**0.125)

        monkeypatch.setattr(targets, "expected_lack", lacks)
        checked = Calibration(model_dice=(0.9,))
        found = update("sam_fed", calibration=checked).metrics
        assert found["room"] == pytest.approx(expected, rel=1e-5)
        parts = found["loss_sup"] + expected * found["loss_agree"]
        assert found["loss"] == pytest.approx(parts, rel=1e-5)
        assert found["loss_agree"] > 0
        assert update("sam_fed").metrics["room"] == 1, "a promise that nobody checked"
        alone = update("sam_soft").metrics
        assert "room" not in alone
        assert alone["loss"] == pytest.approx(alone["loss_sup"] + alone["loss_agree"], rel=1e-5)


def test_supervised_never_touches_the_clients_images() -> None:
    _, client = make_data()
    both = [
        update("supervised", client=ClientData("one", images)).weights
        for images in (client.images, 255 - client.images)
    ]
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())


def test_adabn_learns_nothing_from_the_clients_images_but_their_statistics() -> None:
    """Their share of the loss is nothing, and batch norm's statistics move with them."""
    _, client = make_data()
    first, other = (
        update("adabn", local_steps=1, client=ClientData("one", images))
        for images in (client.images, 255 - client.images)
    )
    assert first.metrics["loss_agree"] == 0
    assert first.metrics["loss"] == first.metrics["loss_sup"]
    moved = [name for name, value in first.weights.items() if name.endswith("running_mean")]
    assert any(not torch.equal(first.weights[name], other.weights[name]) for name in moved)
    alone = update("supervised", local_steps=1)
    assert any(not torch.equal(first.weights[name], alone.weights[name]) for name in moved)


def test_a_mean_teacher_follows_its_model() -> None:
    """A tenth of the way at each step, from the weights that were received."""
    config = settings(method="fed_mean_teacher")
    learner = Learner(build_model(config, seed=0), config, Calibration())
    received = get_state(learner.model)
    rule = TARGETS["mean_teacher"]
    _, client = make_data()
    views = draw_views(client, Sampling.unlabelled(Streams(0), config, torch.device("cpu")))
    made = rule.label(learner, views)
    expected = learner.predict(views.weak)
    assert torch.allclose(made.target, expected, atol=1e-6)
    assert bool((made.weight == 1).all())
    with torch.no_grad():
        for value in (*learner.model.parameters(), *learner.model.buffers()):
            value.copy_(value + 1)
    rule.follow(learner)
    assert learner.teacher is not None
    follows = get_state(learner.teacher)
    parameters = {name for name, _ in learner.model.named_parameters()}
    for name, value in received.items():
        step = 0.1 if name in parameters else 1
        assert torch.allclose(follows[name].double(), value.double() + step, atol=1e-5), name
    assert not torch.allclose(rule.label(learner, views).target, expected, atol=1e-6)


def test_training_learns() -> None:
    public, _ = make_data()
    config = settings(labelled_batch=6)
    model = build_model(config, seed=0)
    rates = [5e-3 * cosine(step, 60) for step in range(60)]
    train_on_server(model, public, rates, streams=Streams(0), config=config)
    images, truth = blobs(8, 9)
    predicted = predict_probabilities(model, images).argmax(dim=1)
    overlap = 2 * (predicted * truth).sum() / (predicted.sum() + truth.sum())
    assert float(overlap) > 0.8


def test_an_audit_by_hand() -> None:
    """Kept: 1|1, 1|0, 0|1, 0|0 (target|truth); dropped: 1|1. Dice = 2*1 / (2 + 2)."""
    assert audited_dice({}) is None
    label, truth = torch.tensor([[[1, 1, 0, 0, 1]]]), torch.tensor([[[1, 0, 1, 0, 1]]])
    counts = audit(PseudoLabel(label, torch.tensor([[[1.0, 0.5, 0.1, 1.0, 0.0]]])), truth)
    assert audited_dice(counts) == 0.5
    classes = torch.tensor([[[2]]])  # foreground in both, but another class
    more = audit(PseudoLabel(classes, torch.ones(1, 1, 1)), torch.tensor([[[1]]]))
    assert audited_dice(
        {name: value + more[name] for name, value in counts.items()}
    ) == pytest.approx(2 / 6)


def test_the_proximal_term_by_hand() -> None:
    """(3^2 + 4^2 + 12^2) / 2 = 84.5, and its gradient is the way back."""
    model = torch.nn.Linear(2, 1)
    start = [each.detach().clone() for each in model.parameters()]
    assert proximal_loss(model, start).item() == 0
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, -4.0]])
        model.bias += 12
    loss = proximal_loss(model, start)
    assert loss.item() == pytest.approx(84.5, rel=1e-5)
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.flatten().tolist() == pytest.approx([3, -4], rel=1e-5)


def test_the_proximal_term_holds_a_client_near_the_broadcast_model() -> None:
    """0 is no term at all; a large one leaves little of the change."""
    free, held = (update("sam_fed", local_steps=20, proximal_weight=mu) for mu in (0.0, 10.0))
    assert "loss_prox" not in free.metrics
    drifts = [result.metrics["drift"] for result in (free, held)]
    assert drifts[0] is not None
    assert drifts[1] is not None
    assert drifts[1] < 0.5 * drifts[0]
    loss, proximal = held.metrics["loss"], held.metrics["loss_prox"]
    assert proximal is not None
    assert loss is not None
    assert proximal > 0
    assert loss > 10 * proximal
