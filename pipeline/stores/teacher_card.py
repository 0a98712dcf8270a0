"""The teacher's card: what it is, known to both stages without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.config import Config, Frame
from pipeline.disk import read_json
from pipeline.errors import DataError, IdentityError
from pipeline.stores.label_store import Identity

CARD_FILE = "card.json"


class TeacherCard(BaseModel):
    """``card.json``: what the teacher is, and how good it is where truth is known."""

    model_config = ConfigDict(frozen=True)

    variant: str
    input_size: int  # px
    num_classes: int
    prompt: str  # policy: "none" (adapted) or "points:<per side>"
    lora_rank: int | None  # None: fine-tuned whole, or not at all
    base_sha256: str  # of the checkpoint's file; "random" if it started from none
    adapter_sha256: str  # of adapter.safetensors; "none" under a prompt
    parameters: int  # of the whole teacher
    trained_parameters: int
    server_sha256: str  # of the images and masks it was trained on and measured with
    train_images: int
    calibration_images: int
    calibration_dice: float  # mean foreground Dice per image, 0..1, at the images' own size
    seed: int
    frame: Frame = "pad"  # what of SAM's square its images run in; cards of before have none
    base_copy_sha256: str | None = None  # of the copy of the checkpoint that came along, if any

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return self.model_dump(exclude_none=True) | {"lora_rank": self.lora_rank}

    @property
    def is_whole(self) -> bool:
        """Whether the adapter's file holds the whole teacher."""
        return self.prompt == "none" and self.lora_rank is None

    def text(self) -> str:
        """Return how good the teacher is, as one line."""
        return (
            f"{self.variant}: Dice {self.calibration_dice:.3f} on {self.calibration_images} "
            f"held-out images, adapted on {self.train_images}"
        )

    def identity(self, *, label_size: int, precision: str, views: int = 1) -> Identity:
        """Return the identity of labels of ``label_size`` px at ``precompute.precision``.

        Args:
            views: of each image, whose mean the labels are.
        """
        return Identity(
            variant=self.variant,
            base_sha256=self.base_sha256,
            adapter_sha256=self.adapter_sha256,
            prompt=self.prompt,
            input_size=self.input_size,
            label_size=label_size,
            num_classes=self.num_classes,
            precision=label_precision(self.variant, precision),
            frame=self.frame,
            views=views,
        )

    def labels(self, config: Config) -> Identity:
        """Return the identity of the labels that the settings ask this teacher for."""
        run = config.precompute
        size = config.data.image_size
        return self.identity(label_size=size, precision=run.precision, views=run.views)

    def check(self, config: Config, server_sha256: str | None, *, path: Path) -> None:
        """Refuse a teacher that is not the one that the settings and the server's set ask for.

        Args:
            server_sha256: None at a site, which need not have the server's set.

        Raises:
            IdentityError: names what differs and the way out.
        """
        wanted: dict[str, object] = {
            "variant": config.sam.variant,
            "prompt": config.sam.prompt_policy,
            "frame": config.sam.frame,
            "lora_rank": config.sam.adapter_rank,
            "num_classes": config.data.num_classes,
            "input_size": config.sam.input_size or self.input_size,
            "server_sha256": self.server_sha256 if server_sha256 is None else server_sha256,
        }
        advice = "run `samfed finetune-sam`"
        if server_sha256 is None:
            advice = "take the server's settings, or its present teacher (`samfed teacher import`)"
        for field, value in wanted.items():
            found = getattr(self, field)
            if found != value:
                what = "was adapted on another server set" if field == "server_sha256" else None
                raise IdentityError(
                    f"{path}: {what or f'{field} is {found}, the settings ask for {value}'}; "
                    f"{advice}"
                )


def label_precision(variant: str, asked: str) -> str | None:
    """Return the precision that labels of ``variant`` depend on; None where masks do not.

    SAM's own encoders keep their masks in lower precision (IoU to fp32 above 0.99,
    ``benchmarks/precision.py``), those with convolutions, ``timm:`` and ``mobile_sam``, do not:
    theirs is fp32 unless another is asked for. int8 moves masks of every encoder.
    """
    if asked == "int8":
        return asked
    if not variant.startswith(("timm:", "mobile_sam")):
        return None
    return "fp32" if asked == "auto" else asked


def load_card(folder: Path) -> TeacherCard:
    """Read ``card.json``.

    Raises:
        StageError: there is no teacher yet. DataError: the card is damaged.
    """
    raw = read_json(folder / CARD_FILE, stage="finetune-sam")
    try:
        return TeacherCard.model_validate(raw)
    except ValueError as error:
        raise DataError(
            f"{folder / CARD_FILE}: not a teacher card; rerun `samfed finetune-sam`"
        ) from error
