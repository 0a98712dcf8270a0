"""What is said of a final model: its temperature, how its training images look to it, its spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import __version__
from pipeline.config import Config, NetworkConfig
from pipeline.federation.calibration import FEWEST_TO_CALIBRATE, split_in_halves
from pipeline.federation.views import PublicSet
from pipeline.segmentation.likeness import Moments, moments, pooled_features
from pipeline.segmentation.model_spec import Calibration, Likeness, ModelSpec, Training
from pipeline.segmentation.networks import normalise
from pipeline.segmentation.reliability import Reliability

NO_DIGEST = "none"  # until the weights are written
#: With fewer images, the sums over a client's features would tell much of a single one.
FEWEST_IMAGES = 8
_RANGE = (-1.5, 0.7)  # of the inverse temperature's decimal logarithm
MOST_PIXELS = 2_000_000  # that the temperature is fitted on, evenly drawn
_STEPS = 30  # of the search: each leaves 0.62 of the range
_GOLDEN = (5**0.5 - 1) / 2


class Pixels(NamedTuple):
    """Logits (n, K+1) float32 and the truth (n,) int64 of pixels, and the image (n,) of each."""

    logits: Tensor
    truth: Tensor
    image: Tensor

    def of(self, images: Tensor) -> Pixels:
        """Return the pixels of some of the images."""
        chosen = torch.isin(self.image, images)
        return Pixels(*(part[chosen] for part in self))


@torch.inference_mode()
def calibration_pixels(model: nn.Module, public: PublicSet) -> Pixels:
    """Return pixels of D_p's calibration part, of every image as many, with the model's logits.

    Those are computed in float32, as ``predict`` computes them.
    """
    images, truth = public.calibration.images, public.calibration.truth
    if truth is None:
        raise ValueError("the calibration part has no truth")
    model.eval()
    device = next(model.parameters()).device
    stride = -(-truth.numel() // MOST_PIXELS)
    logits = [
        model(normalise(batch.to(device).float() / 255)).flatten(2)[:, :, ::stride].cpu()
        for batch in images.split(32)
    ]
    labels = truth.flatten(1)[:, ::stride].long()
    image = torch.arange(len(labels))[:, None].expand_as(labels)
    by_pixel = torch.cat(logits).transpose(1, 2)
    return Pixels(by_pixel.flatten(0, 1), labels.flatten(), image.flatten())


def fit_temperature(pixels: Pixels) -> float:
    """Return the T for which softmax(logits / T) predicts the truth best (Guo et al., ICML 2017).

    The mean negative log-likelihood is convex in 1 / T; a golden-section search finds its least
    value between 1/T = 0.03 and 5.
    """
    low, high = _RANGE

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(pixels.logits * 10**exponent, pixels.truth))

    for _ in range(_STEPS):
        step = _GOLDEN * (high - low)
        left, right = high - step, low + step
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(f"{10 ** (-(low + high) / 2):.6g}")


def _reliability(parts: Sequence[tuple[Pixels, float]]) -> Reliability:
    found = Reliability()
    for pixels, temperature in parts:
        confidence, label = (pixels.logits / temperature).softmax(dim=1).max(dim=1)
        found.add(confidence.numpy(), (label == pixels.truth).numpy())
    return found


def measure_temperature(model: nn.Module, public: PublicSet) -> tuple[float, Calibration]:
    """Return the temperature fitted on D_p's calibration part, and what it is worth.

    The ECE is measured on each half of the images with the temperature of the other half. With
    fewer than four images nothing is fitted.
    """
    pixels, images = calibration_pixels(model, public), len(public.groups)
    before = _reliability([(pixels, 1.0)])
    after, temperature = before, 1.0
    if images >= FEWEST_TO_CALIBRATE:
        one, other = (pixels.of(half) for half in split_in_halves(public.groups))
        crossed = [(one, fit_temperature(other)), (other, fit_temperature(one))]
        after, temperature = _reliability(crossed), fit_temperature(pixels)
    return temperature, Calibration(
        images=images,
        ece_before=before.error(),
        ece=after.error(),
        reliability=after.bins(),
    )


def public_moments(model: nn.Module, public: PublicSet) -> Moments:
    """Return the moments of all of D_p's images, which every client holds."""
    images = torch.cat([public.images, public.calibration.images])
    return moments(pooled_features(model, images))


def training_of(config: Config, public: PublicSet, *, images: int, clients: int = 1) -> Training:
    """Return how a model came to be, in counts."""
    return Training(
        method=config.federate.method,
        rounds=config.federate.played_rounds,
        seed=config.seed,
        client=None,
        clients=clients,
        images=images,
        public_images=len(public.images) + len(public.calibration.images),
    )


def describe(
    model: nn.Module,
    public: PublicSet,
    likeness: Likeness,
    *,
    config: Config,
    network: NetworkConfig,
    training: Training,
) -> ModelSpec:
    """Return the description of a final model, but for the digest of its weights."""
    temperature, calibration = measure_temperature(model, public)
    plain = {key: getattr(network, key) for key in NetworkConfig.model_fields}
    images = public.images
    return ModelSpec(
        samfed=__version__,
        weights_sha256=NO_DIGEST,
        network=NetworkConfig(**plain | {"encoder_weights": None}),
        num_classes=config.data.num_classes,
        class_names=config.data.classes,
        image_size=config.data.image_size,
        grey=bool((images == images[:, :1]).all()),
        temperature=temperature,
        calibration=calibration,
        likeness=likeness,
        training=training,
    )
