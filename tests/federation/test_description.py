"""What a run keeps beside its final model, and how it comes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from watched_engines import Watched, changed

from pipeline.config import Config
from pipeline.disk import file_sha256
from pipeline.errors import StageError
from pipeline.federation.description import (
    Pixels,
    calibration_pixels,
    fit_temperature,
    measure_temperature,
)
from pipeline.federation.messages import AnyRequest, DescribeRequest, Reply
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.federation.views import ClientData, PublicSet
from pipeline.inference.loading import Choice, load_model


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40_000, 3, generator=generator)
    truth = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
    pixels = Pixels(logits, truth[:, 0], torch.zeros(len(logits)))
    assert fit_temperature(pixels) == pytest.approx(temperature, rel=0.05)


class Sure(torch.nn.Module):
    """Calls all of an image background, with a chance of 0.9999."""

    def __init__(self) -> None:
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 2, S, S)."""
        return torch.stack([images[:, 0] * 0 + 9.2, images[:, 0] * 0], dim=1) + self.none


def public_of(groups: str) -> PublicSet:
    """Return grey images of 16 px whose upper quarter is foreground, one of each group."""
    images = torch.full((len(groups), 3, 16, 16), 128, dtype=torch.uint8)
    truth = torch.zeros(len(groups), 16, 16, dtype=torch.uint8)
    truth[:, :4] = 1
    home = ClientData("server", images, truth=truth)
    return PublicSet(images, truth, home, tuple(groups))


@pytest.mark.parametrize("most", [256, 1000, 1024])
def test_no_more_pixels_are_taken_than_is_said(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Of 4 x 256 pixels."""
    monkeypatch.setattr("pipeline.federation.description.MOST_PIXELS", most)
    pixels = calibration_pixels(Sure(), public_of("abcd"))
    assert most / 2 < len(pixels.truth) == len(pixels.logits) <= most
    assert [int((pixels.image == number).sum()) for number in range(4)] == [
        len(pixels.image) // 4
    ] * 4


@pytest.mark.parametrize(("groups", "fitted"), [("aaaa", True), ("abcd", True), ("aaa", False)])
def test_the_temperature_of_few_images(groups: str, fitted: bool) -> None:
    """A single patient is measured on too, and fewer than four images never."""
    temperature, found = measure_temperature(Sure(), public_of(groups))
    assert (temperature > 2) == fitted
    assert (found.ece < found.ece_before) == fitted


def test_a_spec_holds_counts_and_belongs_to_its_weights(shared_pipeline: Config) -> None:
    run = RunFolder(shared_pipeline.cache.root / "runs" / "sam_fed")
    spec = run.spec()
    assert spec.weights_sha256 == file_sha256(run.model_path)
    assert spec.training.clients == 4
    assert spec.training.public_images == shared_pipeline.partition.server_images
    assert 0 < spec.calibration.ece <= 1
    text = (run.path / "models" / "global.json").read_text()
    assert "site_" not in text


def test_what_a_client_says_of_its_images(
    labelled: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sums and one number, from clients with enough images; what cannot be is left out."""
    monkeypatch.setattr("pipeline.federation.server.FEWEST_IMAGES", 1)
    monkeypatch.setattr("pipeline.federation.client.FEWEST_IMAGES", 1)

    def spoil(request: AnyRequest, reply: Reply) -> Reply:
        if reply.features is not None and reply.client == "site_b":
            return replace(reply, features=-reply.features)
        return reply

    honest, hostile = Watched(), Watched(spoil)
    whole = federate(changed(labelled, "honest"), connect=honest.connect).spec()
    found = federate(changed(labelled, "hostile"), connect=hostile.connect).spec()
    said = [reply for asked, reply in honest.seen if isinstance(asked, DescribeRequest)]
    sums, distances = said[: len(said) // 2], said[len(said) // 2 :]
    assert [set(reply.metrics) for reply in sums] == [set()] * 4
    assert [(reply.features, set(reply.metrics)) for reply in distances] == [
        (None, {"distance"})
    ] * 4
    public = labelled.partition.server_images
    assert whole.likeness.images == public + sum(reply.images for reply in sums)
    left_out = next(reply.images for reply in sums if reply.client == "site_b")
    assert found.likeness.images == whole.likeness.images - left_out
    assert "site_b: what it says of its images is left out" in caplog.messages


def test_a_client_describes_its_own_model(labelled: Config) -> None:
    run = federate(changed(labelled, "own", own=True))
    assert not run.model_path.exists()
    specs = {name: run.spec(name) for name in ("site_a", "site_b")}
    assert {name: spec.training.client for name, spec in specs.items()} == {
        "site_a": "site_a",
        "site_b": "site_b",
    }
    assert specs["site_a"].network != specs["site_b"].network
    model = load_model(labelled, Choice(str(run.path), "site_a", device="cpu"))
    assert model.digest == specs["site_a"].digest
    with pytest.raises(StageError, match=r"have their own: --client site_a \| site_b"):
        load_model(labelled, Choice(str(run.path)))
