"""``mobile_sam``: equal to the public MobileSAM, and a teacher like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import PREPARED, copy_cache
from segment_anything.modeling import Sam
from torch import Tensor, nn

from pipeline.config import Config, SamConfig
from pipeline.data.partition import load_partition
from pipeline.errors import ConfigError
from pipeline.labelling.precompute import precompute
from pipeline.results.evaluate_teacher import evaluate_teacher
from pipeline.sam.build import build_sam
from pipeline.sam.checkpoints import base_checkpoint, build_base
from pipeline.sam.export import trace
from pipeline.sam.finetune import finetune
from pipeline.sam.frame import inside_image
from pipeline.sam.lora import LoraQKV, add_adapter, merge_lora
from pipeline.sam.onnx import INPUTS
from pipeline.sam.teacher import encode, load_teacher
from pipeline.sam.tiny_vit import from_mobile_sam
from tools.mobile_sam_golden import GOLDEN, random_image, random_weights, sample

golden = json.loads(GOLDEN.read_text())


@torch.no_grad()
def test_the_encoder_equals_the_public_one() -> None:
    """At 1024 px, the one size that the public code takes, which is why this takes seconds."""
    sam = build_sam("mobile_sam")
    encoder = from_mobile_sam(random_weights(golden["shapes"]))
    missing, unexpected = sam.load_state_dict(encoder, strict=False)
    assert unexpected == []
    assert not any(name.startswith("image_encoder.") for name in missing)
    sam.eval()
    found, expected = sample(sam.image_encoder(random_image())), golden["embedding"]
    assert max(abs(value) for value in expected) > 1
    assert found == pytest.approx(expected, abs=2e-4, rel=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of ``mobile_sam.pt``."""
    with torch.device("meta"):
        sam = build_sam("mobile_sam").state_dict()
    rest = {k: v.shape for k, v in sam.items() if not k.startswith("image_encoder.")}
    path = tmp_path_factory.mktemp("weights") / "mobile_sam.pt"
    torch.save(random_weights({**golden["shapes"], **rest}), path)
    return path


@torch.no_grad()
def test_low_rank_updates_of_its_heads_can_be_merged() -> None:
    """Its projections lie head by head, unlike those of segment-anything."""
    torch.manual_seed(0)
    sam = build_sam("mobile_sam", input_size=64).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = sam.image_encoder(images)
    names = add_adapter(sam, 2)
    lora = {name: value for name, value in sam.named_parameters() if ".attn.qkv." in name}
    updates = [name for name in names if name in lora]
    assert len(updates) == 4 * (2 + 6 + 2)
    assert torch.equal(sam.image_encoder(images), before)
    for name in updates:
        lora[name].copy_(torch.randn(lora[name].shape) * 0.1)
    updated = sam.image_encoder(images)
    merge_lora(sam)
    merged = sam.image_encoder(images)
    assert float((updated - before).norm() / before.norm()) > 0.01
    assert float((merged - updated).norm() / before.norm()) < 1e-5


@torch.no_grad()
def test_the_queries_of_every_head_are_updated_and_its_keys_are_not() -> None:
    attention = build_sam("mobile_sam").image_encoder.stages[1].blocks[0].attn
    assert attention.num_heads == 4
    lora = LoraQKV(attention.qkv, 2, groups=attention.num_heads)
    x = torch.randn(3, attention.qkv.in_features)
    before = lora(x)
    lora.b_q.fill_(1.0)
    change = (lora(x) - before).unflatten(-1, (4, 3, -1))  # head, of q, k, v, width
    assert bool((change[:, :, 0] != 0).all())
    assert not change[:, :, 1:].any()


def test_it_takes_other_sizes_and_no_others() -> None:
    assert build_sam("mobile_sam", input_size=96).image_encoder.img_size == 96
    with pytest.raises(ConfigError, match=r"sam\.input_size: 100 is not a multiple of 32"):
        build_sam("mobile_sam", input_size=100)
    with pytest.raises(ConfigError, match=r"sam\.checkpoint: mobile_sam needs a checkpoint;"):
        base_checkpoint(SamConfig(variant="mobile_sam"))


def test_it_is_adapted_and_labels(
    shared_pipeline: Config, checkpoint: Path, tmp_path: Path
) -> None:
    """Batch normalisation keeps its statistics, which an adapter does not hold."""
    config = copy_cache(shared_pipeline, tmp_path / "cache", PREPARED)
    sam = {"variant": "mobile_sam", "checkpoint": checkpoint, "input_size": 64}
    config = config.model_copy(update={"sam": config.sam.model_copy(update=sam)})
    card = finetune(config)
    assert (card.input_size, card.lora_rank) == (64, 2)
    assert card.base_sha256 == base_checkpoint(config.sam)[1]
    assert 0 < card.trained_parameters < card.parameters / 2
    teacher = load_teacher(config, load_partition(config.cache.root / "partition.json"))
    state, base = teacher.sam.state_dict(), build_base(config.sam, num_classes=1).state_dict()
    statistics = [name for name in base if ".bn." in name]
    assert statistics
    assert all(torch.equal(state[name], base[name]) for name in statistics)
    assert precompute(config).failed == []
    assert set(evaluate_teacher(config).teachers["points"]) > {"dice", "ece"}


class Embedding(nn.Module):
    """The encoder as a function of what an exported teacher takes."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, pixels: Tensor, valid_hw: Tensor) -> Tensor:
        rows = pixels.permute(0, 3, 1, 2)  # as they lie in a picture
        return encode(self.sam, rows, inside_image(valid_hw, rows.shape[-2:]))


@pytest.mark.parametrize("patch", [None, 16], ids=["pad", "content"])
def test_its_encoder_can_be_exported(patch: int | None) -> None:
    """With one block a stage, because torch's exporter takes a minute for all of a teacher."""
    torch.manual_seed(0)
    sam = build_sam("mobile_sam", input_size=128).eval()
    for number, stage in enumerate(sam.image_encoder.stages):
        few = patch is None or number >= 2  # more of the same where the frame's shape is open
        stage.blocks = stage.blocks[: int(few)]
    network = Embedding(sam)
    model = onnx_ir.to_proto(trace(network, input_size=128, patch=patch, outputs=["embedding"]))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # 7 rows or columns of tokens are one window of its last stage, 14 two
    shapes = [(128, 128)] if patch is None else [(112, 112), (80, 128), (128, 16), (112, 96)]
    for height, width in shapes:
        pixels = torch.randint(0, 256, (3, height, width, 3)).to(torch.uint8)
        inputs = (pixels, torch.tensor([[height, width], [height, width // 2], [16, width]]))
        with torch.no_grad():
            expected = network(*inputs).numpy()
        named = dict(zip(INPUTS, (value.numpy() for value in inputs), strict=True))
        found = session.run(["embedding"], named)[0]
        assert abs(found - expected).max() < 1e-4 < abs(expected).max()
