"""Write ``tests/sam/mobile_sam.json``: what the public MobileSAM computes with random weights.

``tests/sam/test_mobile_sam.py`` holds the encoder here to it. It needs a clone of the public code:

    git clone https://github.com/ChaoningZhang/MobileSAM /somewhere
    python -m tools.mobile_sam_golden /somewhere
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "tests" / "sam" / "mobile_sam.json"
SIZE = 1024  # px; the public code takes no other
STEP = 16  # every so many cells of the embedding are kept, and every so many channels


def random_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return weights (float32) that depend on their name and shape alone, of a trained scale."""
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = draw.random(shape) * 2 - 1
    if len(shape) > 1 and not name.endswith("attention_biases"):
        values *= 2 / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        values = 1 + values / 2
    return torch.from_numpy(values.astype(np.float32))


def random_image() -> Tensor:
    """Return a normalised image (1, 3, ``SIZE``, ``SIZE``) float32 of smooth colours and noise."""
    steps = torch.arange(SIZE) / SIZE
    waves = torch.stack([torch.sin((3 + c) * 6.28 * steps)[:, None] + steps for c in range(3)])
    noise = np.random.Generator(np.random.PCG64(0)).random((3, SIZE, SIZE)) - 0.5
    return (waves + torch.from_numpy(noise.astype(np.float32)))[None]


def sample(embedding: Tensor) -> list[float]:
    """Return some values of an embedding (1, C, h, w), in order."""
    values = embedding[0, ::STEP, ::STEP, 1::STEP].flatten().tolist()
    return [round(value, 5) for value in values]


@torch.no_grad()
def main(clone: str) -> None:
    """Run the public code on ``random_weights`` and keep names, shapes and a sample."""
    import pipeline.sam  # noqa: F401  (before timm imports torchvision)

    sys.path.insert(0, clone)
    from mobile_sam import sam_model_registry  # type: ignore[import-not-found]

    encoder = sam_model_registry["vit_t"]().image_encoder.eval()
    shapes = {f"image_encoder.{name}": v.shape for name, v in encoder.state_dict().items()}
    weights = random_weights(shapes)
    encoder.load_state_dict({k.removeprefix("image_encoder."): v for k, v in weights.items()})
    encoder.eval()  # which caches the attention's biases
    golden = {"shapes": shapes, "embedding": sample(encoder(random_image()))}
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
