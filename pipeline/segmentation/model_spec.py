"""What a trained model is and how it is used: JSON beside its weights, or inside an exported file.

It imports no torch: an exported model is used without.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.config import ClassCount, NetworkConfig, Side
from pipeline.disk import write_json
from pipeline.errors import CorruptStoreError, FormatError, StageError

FORMAT = 1
_AGAIN = (
    "copy it again, or write it anew: `samfed federate` does for a run, `samfed export` for an "
    "exported model"
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Likeness(_Part):
    """How the training images look to the model; ``likeness.distances`` measures against it.

    An image's C pooled features f have the distance |W (f - mean)| / sqrt(C).
    """

    images: PositiveInt  # behind it, D_p's included
    mean: tuple[float, ...]  # (C,)
    whitening: tuple[tuple[float, ...], ...]  # W, (C, C)
    threshold: PositiveFloat  # a larger distance is unlike the images that it was trained on

    @model_validator(mode="after")
    def _check(self) -> Likeness:
        if {len(self.mean)} != {len(self.whitening), *map(len, self.whitening)}:
            raise ValueError("expected as many features in the mean as in the whitening matrix")
        return self


class Calibration(_Part):
    """How far the probabilities can be believed, on D_p's calibration part.

    ECE before and after the temperature, which was fitted on the other half of the images for it;
    0..1, over all pixels. ``reliability`` has the bins of ``Reliability.bins``, after.
    """

    images: int
    ece_before: float
    ece: float
    reliability: dict[str, list[float | None]]

    @field_validator("reliability")
    @classmethod
    def _check(cls, bins: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
        if {*bins} != {"pixels", "confidence", "accuracy"} or None in bins["pixels"]:
            raise ValueError("expected pixels, confidence and accuracy of each bin")
        if len({*map(len, bins.values())}) > 1:
            raise ValueError("expected as many bins in each")
        return bins


class Training(_Part):
    """How the model came to be: counts only, no names of images."""

    method: str
    rounds: int
    seed: int
    client: str | None  # whose own model it is; None for the global one
    clients: int
    images: int  # of all clients, unlabelled; of a client's own model its own
    public_images: int  # of D_p, labelled, the calibration part included
    epsilon: float | None = None  # of differential privacy for each client, at ``delta``
    delta: float | None = None


class ModelSpec(_Part):
    """All that using a model takes beside its weights."""

    format: int = FORMAT
    samfed: str  # the version that wrote it
    weights_sha256: str  # of the weights' file in the run's folder
    network: NetworkConfig  # without ``encoder_weights``: they are in the weights
    num_classes: ClassCount  # K foreground classes; 0 is background
    class_names: tuple[str, ...]  # of 1..K
    image_size: Side  # side of the square that images are squashed to, px, bilinear
    grey: bool  # whether all of D_p's images are grey; a grey image is repeated over RGB
    temperature: PositiveFloat  # probabilities are softmax(logits / temperature)
    calibration: Calibration
    likeness: Likeness
    training: Training

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"expected {self.num_classes} class_names")
        return self

    @property
    def digest(self) -> str:
        """A sha256 of all of it, and so of the weights."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically; the same model gives the same bytes."""
        write_json(path, self.model_dump(mode="json"))


def read_spec(path: Path) -> ModelSpec:
    """Read what ``ModelSpec.write`` wrote.

    Raises:
        StageError: there is none. FormatError, CorruptStoreError: as ``parse_spec``.
    """
    if not path.is_file():
        raise StageError(
            f"{path}: not found; copy it there from where the weights beside it came from, or, for "
            "a run of your own, run `samfed federate` again, which writes it anew"
        )
    return parse_spec(path.read_bytes(), source=str(path))


def parse_spec(content: bytes | str, *, source: str) -> ModelSpec:
    """Return the description in ``content``, JSON; ``source`` names it in errors.

    Raises:
        FormatError: another version of samfed wrote it. CorruptStoreError: it is no description.
    """
    try:
        raw: Any = json.loads(content)
        found = raw["format"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptStoreError(
            f"{source}: no description of a model ({error}); {_AGAIN}"
        ) from error
    if found != FORMAT:
        raise FormatError(
            f"{source}: found format {found!r}, expected {FORMAT}; use the samfed that wrote it "
            f"({raw.get('samfed', 'unknown')}), or export it again"
        )
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(top level)"
        fault = first["msg"].removeprefix("Value error, ")
        raise CorruptStoreError(f"{source}: damaged at {where} ({fault}); {_AGAIN}") from error
