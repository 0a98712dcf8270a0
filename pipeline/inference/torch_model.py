"""Models that torch runs: a run's networks, and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.images import resize_image
from pipeline.data.partition import load_partition
from pipeline.disk import file_sha256
from pipeline.errors import CorruptStoreError, StageError
from pipeline.inference.model import Outputs, Pixels
from pipeline.runtime import resolve_device
from pipeline.sam.frame import LOGIT_STRIDE, fit_longest_side
from pipeline.sam.teacher import Teacher, load_teacher
from pipeline.segmentation.likeness import distances, logits_and_features
from pipeline.segmentation.model_spec import ModelSpec, read_spec
from pipeline.segmentation.networks import build_model, normalise
from pipeline.stores.plain_data import State, load


class NetworkModel:
    """A trained network with its spec."""

    def __init__(self, spec: ModelSpec, weights: State, *, device: str) -> None:
        """Build the network that the spec names.

        Raises:
            ConfigError: it cannot be built here, or there is no such device. CorruptStoreError: the
            weights are not those of this network.
        """
        self.spec, self.num_classes, self.grey = spec, spec.num_classes, spec.grey
        self.class_names = spec.class_names
        self.digest, self.threshold = spec.digest, spec.likeness.threshold
        self._device = resolve_device(device)
        data = {"num_classes": spec.num_classes, "image_size": spec.image_size}
        settings = Config.model_validate({"data": data})
        model = build_model(settings, seed=0, network=spec.network)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CorruptStoreError(
                f"the weights are not of {spec.network.architecture} with encoder "
                f"'{spec.network.encoder}' as their description says; get the model again"
            ) from error
        self.network = model.eval().requires_grad_(False).to(self._device)
        self._mean, self._whitening = (
            torch.tensor(values, dtype=torch.float64, device=self._device)
            for values in (spec.likeness.mean, spec.likeness.whitening)
        )

    def frame(self, image: Pixels) -> Pixels:
        """Squash an image (H, W, 3) uint8 to the network's square."""
        return resize_image(image, self.spec.image_size)

    @torch.inference_mode()
    def predict(self, frames: Sequence[Pixels]) -> Outputs:
        """Predict frames (S, S, 3) uint8, all in one batch."""
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).to(self._device)
        logits, features = logits_and_features(self.network, normalise(images.float() / 255))
        probabilities = (logits.float() / self.spec.temperature).softmax(dim=1)
        found = distances(features.double(), self._mean, self._whitening)
        return Outputs(probabilities.cpu().numpy(), found.cpu().numpy())


def load_network(weights: Path, *, device: str) -> NetworkModel:
    """Load a model from its weights, with the spec that lies beside them as ``.json``.

    Raises:
        StageError: one of both is missing. CorruptStoreError: one is damaged, or they do not belong
        together. FormatError: another version wrote them. ConfigError: as ``NetworkModel``.
    """
    spec = read_spec(weights.with_suffix(".json"))
    if not weights.is_file():
        raise StageError(f"{weights}: not found; it belongs beside its .json")
    state = load(weights, State)
    if file_sha256(weights) != spec.weights_sha256:
        raise CorruptStoreError(
            f"{weights}: sha256 differs from its .json; run `samfed federate` again, or get both"
        )
    return NetworkModel(spec, state, device=device)


class TeacherModel:
    """SAM as stage one runs it; nothing tells how images look to it."""

    threshold, grey = float("inf"), False

    def __init__(self, teacher: Teacher, class_names: tuple[str, ...]) -> None:
        card, self.class_names = teacher.card, class_names
        self._teacher, self.num_classes = teacher, card.num_classes
        self.digest = f"{card.base_sha256}-{card.adapter_sha256}-{card.prompt}"
        if card.frame != "pad":
            self.digest += f"-{card.frame}"
        self._side = max(1, card.input_size // LOGIT_STRIDE)  # px, as fine as its logits are

    def frame(self, image: Pixels) -> Pixels:
        """Resize an image (H, W, 3) uint8 to the teacher's longest side."""
        return fit_longest_side(image, self._teacher.card.input_size)

    def predict(self, frames: Sequence[Pixels]) -> Outputs:
        """Predict frames of any sizes, all in one batch."""
        probabilities, _ = self._teacher.probabilities(frames, (self._side, self._side))
        return Outputs(probabilities.float().cpu().numpy(), None)


def load_teacher_model(config: Config, *, device: str) -> TeacherModel:
    """Load the teacher of the cache, as the settings ask for it.

    Raises:
        StageError, IdentityError, ConfigError: as ``load_teacher``.
    """
    precompute = config.precompute.model_copy(update={"device": device})
    settings = config.model_copy(update={"precompute": precompute})
    teacher = load_teacher(settings, load_partition(config.cache.root / "partition.json"))
    return TeacherModel(teacher, config.data.classes)
