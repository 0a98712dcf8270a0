"""The exported teacher says what the torch teacher says, and a file that is not it is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything and timm import torchvision)

# isort: split
import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from conftest import (
    PREPARED,
    Project,
    answer,
    build_once,
    copy_cache,
    digest,
    fails,
    listing,
)
from dask_processes import thread_workers
from numpy.typing import NDArray
from teachers import on_workers

from pipeline.config import Config, PrecomputeConfig
from pipeline.data.partition import load_partition
from pipeline.disk import file_sha256, write_json, writer_lock
from pipeline.errors import ConfigError, CorruptStoreError, IdentityError, StageError
from pipeline.inference.onnx_model import OnnxModel
from pipeline.labelling.precompute import precompute
from pipeline.params import load_config
from pipeline.sam import build, checkpoints, export
from pipeline.sam import onnx as backend
from pipeline.sam.attention import for_any_frame
from pipeline.sam.build import ENCODERS, build_sam
from pipeline.sam.checkpoints import EMBEDDED_WEIGHTS
from pipeline.sam.export import TeacherNetwork, about_model, trace, write_model
from pipeline.sam.finetune import finetune
from pipeline.sam.frame import inside_image, to_input_frame
from pipeline.sam.onnx import (
    CPU,
    CUDA,
    INPUTS,
    MAPS,
    OUTPUTS,
    OnnxTeacher,
    auto_precision,
)
from pipeline.sam.teacher import ADAPTER_FILE, Teacher, forward, load_teacher
from pipeline.stores.label_store import LabelStore
from pipeline.stores.onnx_sidecar import About
from pipeline.stores.pseudo_labels import PseudoLabels
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard

Images = list[NDArray[np.uint8]]
BACKBONE = "timm:test_resnet"  # timm's smallest: tracing costs by the operator
AGAIN = "run `samfed export-onnx` again"
SQUARE, WIDE, TALL = (96, 96), (48, 120), (300, 90)


def images(*sizes_hw: tuple[int, int]) -> Images:
    """Smooth random images: a coarse grid of colours, enlarged."""
    rng = np.random.default_rng(7)
    made = []
    for height, width in sizes_hw:
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 5, 5)))
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        made.append(smooth[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy())
    return made


def assert_close(
    found: PseudoLabels, expected: PseudoLabels, *, levels: int = 1, pixels: float = 1e-3
) -> None:
    """Equal but for what another order of float operations may change."""
    for name in ("masks", "confidences", "predicted_iou"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert getattr(found, name).shape == getattr(expected, name).shape
    assert float((found.masks != expected.masks).mean()) <= pixels
    gap = np.abs(found.confidences.astype(int) - expected.confidences.astype(int))
    assert gap.max() <= levels
    assert np.abs(found.predicted_iou - expected.predicted_iou).max() <= 1e-4 * levels


def disturb(folder: Path) -> None:
    """Move the adapter away from what one epoch reached, so that its masks show something."""
    path, generator = folder / ADAPTER_FILE, torch.Generator().manual_seed(0)
    state = safetensors.torch.load_file(path)
    for name, value in state.items():
        if any(part in name for part in ("image_encoder", "mask_tokens", "hypernet")):
            noise = torch.randn(value.shape, generator=generator)
            state[name] = value + 0.3 * value.std().clamp(min=0.02) * noise
    safetensors.torch.save_file(state, path)
    card = json.loads((folder / CARD_FILE).read_text())
    write_json(folder / CARD_FILE, {**card, "adapter_sha256": file_sha256(path)})


class Exported(Project):
    """A project whose teacher, a vit_t of two blocks, was exported by the command."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.said = json.loads((folder / "said.json").read_text())
        self.model = self.cache / "onnx" / "teacher.onnx"
        exact = load_config(self.params, ("precompute.precision=fp32",))
        self.torch = load_teacher(exact, self.partition())

    @staticmethod
    def build(folder: Path) -> None:
        """Make the project in an empty folder."""
        project = Project(folder)
        answer("synth", project.images, *project.options)
        answer("prepare", *project.options)
        answer("finetune-sam", *project.options)
        disturb(project.cache / "teacher")
        before = {path.name for path in (project.cache / "teacher").iterdir()}
        said = answer("export-onnx", *project.options)
        # that folder is finetune-sam's output: DVC would run it again
        assert {path.name for path in (project.cache / "teacher").iterdir()} == before
        (folder / "said.json").write_text(json.dumps(said))

    def partition(self) -> Any:
        return load_partition(self.cache / "partition.json")


def one_layer(transformer: Any, **sizes: Any) -> Any:
    """Return the first half of a decoder, which draws as many random numbers as the whole."""
    made = transformer(**sizes)
    made.layers = made.layers[:1]
    return made


@pytest.fixture(scope="module")
def two_blocks(shared_pipeline: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let vit_t have a block with windows, one without, and half a decoder.

    Tracing costs by the operator. The pipeline that all tests share comes first, so that it is
    never made of this network.
    """
    sizes = {**ENCODERS["vit_t"], "depth": 2, "global_attn_indexes": (1,)}
    taken = {"0": "0", "2": "1"}  # the first of each kind
    state = {}
    for name, value in safetensors.torch.load_file(EMBEDDED_WEIGHTS).items():
        match = re.fullmatch(r"(image_encoder\.blocks\.)(\d+)(\..+)", name)
        if ".transformer.layers.1." in name:
            continue
        if match is None:
            state[name] = value
        elif match[2] in taken:
            state[f"{match[1]}{taken[match[2]]}{match[3]}"] = value
    weights = tmp_path_factory.mktemp("weights") / "vit_t.safetensors"
    safetensors.torch.save_file(state, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "vit_t", sizes)
        patch.setattr(checkpoints, "EMBEDDED_WEIGHTS", weights)
        patch.setattr(build, "TwoWayTransformer", partial(one_layer, build.TwoWayTransformer))
        yield


@pytest.fixture(scope="module")
def exported(two_blocks: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(build_once(tmp_path_factory, "onnx-vit_t", Exported.build))


@pytest.fixture
def project(exported: Exported, tmp_path: Path) -> Project:
    """A copy that a test may change."""
    copy = Project(tmp_path)
    shutil.copytree(exported.cache, copy.cache)
    shutil.copytree(exported.images, copy.images)
    return copy


class Timm:
    """A timm teacher of two classes, made in memory, and its ONNX graphs."""

    label_size = 48

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        torch.manual_seed(3)
        sam = build_sam(BACKBONE, input_size=64, num_multimask=2)
        sam.mask_decoder.transformer.layers = sam.mask_decoder.transformer.layers[:1]
        for parameter in sam.mask_decoder.parameters():
            parameter.data *= 3  # so that every class wins somewhere
        self.card = TeacherCard(
            variant=BACKBONE,
            input_size=64,
            num_classes=2,
            prompt="none",
            lora_rank=None,
            base_sha256="random",
            adapter_sha256="a" * 64,
            parameters=0,
            trained_parameters=0,
            server_sha256="s" * 64,
            train_images=0,
            calibration_images=0,
            calibration_dice=0.0,
            seed=0,
        )
        self.torch = Teacher(sam, self.card, device="cpu", precision="fp32")
        graphs = build_once(factory, "onnx-timm", self._trace)
        self.graph, self.fp16 = (onnx_ir.load(graphs / f"{name}.onnx") for name in ("fp32", "fp16"))

    def _trace(self, folder: Path) -> None:
        for name in ("fp32", "fp16"):
            sam = copy.deepcopy(self.torch.sam)  # for fp16, its norms are changed in place
            network = TeacherNetwork(sam, label_size=self.label_size, fp16=name == "fp16")
            onnx_ir.save(trace(network, input_size=64), folder / f"{name}.onnx")

    def about(self, *, precision: str = "fp32", **changes: object) -> About:
        identity = self.card.identity(label_size=self.label_size, precision=precision)
        found = about_model(self.graph, identity, precision=precision)
        top = {name: changes.pop(name) for name in [*changes] if name in About.model_fields}
        return found.model_copy(update={"identity": {**found.identity, **changes}, **top})

    def write(self, path: Path, *, external_above: int = 1 << 29, **changes: object) -> Path | None:
        return write_model(path, self.graph, self.about(**changes), external_above=external_above)

    def load(self, path: Path, **options: Any) -> OnnxTeacher:
        options = {"label_size": self.label_size, "device": "cpu", "precision": "auto", **options}
        return OnnxTeacher(path, self.card, **options)


@pytest.fixture(scope="module")
def timm(tmp_path_factory: pytest.TempPathFactory) -> Timm:
    return Timm(tmp_path_factory)


# --------------------------------------------------------------------------- parity


@pytest.mark.parametrize("sizes", [[WIDE], [SQUARE, TALL, WIDE]], ids=["one", "three"])
def test_vit_t_labels_as_torch_does(exported: Exported, sizes: Sequence[tuple[int, int]]) -> None:
    config = load_config(exported.params)
    two = load_config(exported.params, ("precompute.views=2",))  # of the same file
    assert backend.load_onnx_teacher(two, exported.partition()).views == 2
    teacher = backend.load_onnx_teacher(config, exported.partition())
    batch = images(*sizes)
    expected = exported.torch.label(batch, 32)
    assert set(np.unique(expected.masks)) == {0, 1}
    found = teacher.label(batch, 32)
    assert_close(found, expected)
    again = teacher.label(batch, 32)
    assert all(getattr(again, n).tobytes() == getattr(found, n).tobytes() for n in OUTPUTS)


@pytest.mark.parametrize("sizes", [[TALL], [SQUARE, WIDE]], ids=["one", "two"])
def test_timm_labels_of_two_classes(
    timm: Timm, tmp_path: Path, sizes: Sequence[tuple[int, int]]
) -> None:
    timm.write(tmp_path / "t.onnx")
    batch = images(*sizes)
    expected = timm.torch.label(batch, 48)
    assert set(np.unique(expected.masks)) == {0, 1, 2}
    assert_close(timm.load(tmp_path / "t.onnx").label(batch, 48), expected)


@pytest.mark.parametrize("views", [1, 8])
def test_views_and_probabilities_as_torch_has_them(timm: Timm, tmp_path: Path, views: int) -> None:
    timm.write(tmp_path / "t.onnx")
    batch = images(SQUARE, TALL, WIDE)
    asked = PrecomputeConfig(views=views, probabilities=True, device="cpu", precision="fp32")
    expected = copy.copy(timm.torch).tune(asked).label(batch, 48)
    teacher = timm.load(tmp_path / "t.onnx").tune(asked)
    found = teacher.label(batch, 48)
    assert_close(found, expected)
    assert found.probabilities is not None
    assert expected.probabilities is not None
    gap = np.abs(found.probabilities.astype(int) - expected.probabilities.astype(int))
    assert gap.shape == (3, 3, 48, 48)
    assert gap.max() <= 1
    if views == 1:  # the graph's own labels, of which it also gives what they come from
        plain = timm.load(tmp_path / "t.onnx").label(batch, 48)
        assert all(getattr(plain, n).tobytes() == getattr(found, n).tobytes() for n in OUTPUTS)
        assert found.view_agreement is None
    else:
        assert found.view_agreement == pytest.approx(expected.view_agreement, abs=1e-3)
        assert found.flip_dice == pytest.approx(expected.flip_dice, abs=1e-3)


def test_fp16_is_near_fp32(timm: Timm, tmp_path: Path) -> None:
    """On the CPU provider, which has few fp16 kernels but computes in fp16 all the same."""
    proto = onnx_ir.to_proto(timm.fp16)
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    session = ort.InferenceSession(proto.SerializeToString(), providers=[CPU])
    batch = images(SQUARE, TALL, WIDE)
    pixels, valid_hw = to_input_frame(batch, 64)
    inputs = (pixels.permute(0, 2, 3, 1).numpy(), valid_hw.numpy())
    found = PseudoLabels(*session.run(list(OUTPUTS), dict(zip(INPUTS, inputs, strict=True))))
    expected = timm.torch.label(batch, 48)
    assert float((found.masks != expected.masks).mean()) < 0.005
    gap = np.abs(found.confidences.astype(int) - expected.confidences.astype(int))
    assert np.percentile(gap, 98) <= 4  # of 255 levels
    assert np.abs(found.predicted_iou - expected.predicted_iou).max() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cuda_labels_as_torch_does(timm: Timm, tmp_path: Path, precision: str) -> None:
    graph = timm.fp16 if precision == "fp16" else timm.graph
    about = timm.about(precision=precision)
    write_model(tmp_path / "t.onnx", graph, about, external_above=1 << 29)
    teacher = timm.load(tmp_path / "t.onnx", device="cuda", precision=precision)
    assert teacher.provenance()["provider"] == CUDA
    batch = images(SQUARE, TALL, WIDE)
    found = teacher.label(batch, 48)
    loose = {"levels": 4, "pixels": 0.02} if precision == "fp16" else {}
    assert_close(found, timm.torch.label(batch, 48), **loose)  # type: ignore[arg-type]
    again = teacher.label(batch, 48)
    assert all(getattr(again, n).tobytes() == getattr(found, n).tobytes() for n in OUTPUTS)


# --------------------------------------------------------------------------- frames of any shape


class WithLogits(TeacherNetwork):
    """An exported teacher that also gives the logits from which its labels come."""

    def forward(self, pixels: torch.Tensor, valid_hw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = []

        def keep(*given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            kept.append(forward(*given, **options))
            return kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "forward", keep)
            labels = super().forward(pixels, valid_hw)
        ((logits, _),) = kept
        return *labels, logits


@pytest.fixture(scope="module")
def content(
    two_blocks: None, shared_pipeline: Config, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """Settings of a teacher that runs content frames, exported with its logits."""

    def build(folder: Path) -> None:
        config = in_content_frames(copy_cache(shared_pipeline, folder / "cache", PREPARED))
        finetune(config)
        disturb(folder / "cache/teacher")
        with pytest.MonkeyPatch.context() as patch:
            names = (*OUTPUTS, *MAPS, "logits")
            patch.setattr(export, "trace", partial(trace, outputs=names))
            patch.setattr(export, "TeacherNetwork", WithLogits)
            export.export_teacher(config)

    folder = build_once(tmp_path_factory, "onnx-content", build)
    cache = shared_pipeline.cache.model_copy(update={"root": folder / "cache"})
    return in_content_frames(shared_pipeline.model_copy(update={"cache": cache}))


def in_content_frames(config: Config) -> Config:
    sam = config.sam.model_copy(update={"frame": "content"})
    run = config.precompute.model_copy(update={"precision": "fp32"})
    return config.model_copy(update={"sam": sam, "precompute": run})


@pytest.mark.parametrize("views", [1, 8])
def test_one_model_for_frames_of_every_shape(content: Config, views: int) -> None:
    """256 px are 16 tokens, which windows of 8 divide; they do not divide most of these frames."""
    run = content.precompute.model_copy(update={"views": views})
    config = content.model_copy(update={"precompute": run})
    partition = load_partition(content.cache.root / "partition.json")
    expected, found = load_teacher(config, partition), backend.load_onnx_teacher(config, partition)
    batch = images((90, 120), (60, 200), SQUARE, (120, 90), (30, 40), (3, 400), (400, 3))
    labels = expected.label(batch, 32)
    assert set(np.unique(labels.masks)) == {0, 1}
    assert_close(found.label(batch, 32), labels)
    for image in batch:
        pixels, valid_hw = to_input_frame([image], 256, 16)
        rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        (logits,) = found.run(rows, valid_hw.numpy(), names=("logits",))
        inside = inside_image(valid_hw, pixels.shape[-2:])
        with torch.no_grad():
            near = forward(expected.sam, pixels, inside)[0].numpy()
        assert logits.shape == near.shape == (1, 2, rows.shape[1] // 4, rows.shape[2] // 4)
        assert np.abs(logits - near).max() < 1e-4 * max(1, np.abs(near).max())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 13, 16), (3, 8, 5), (1, 1, 16)])
def test_windows_picked_by_place_are_the_others(shape: tuple[int, int, int]) -> None:
    encoder = build_sam("vit_t").image_encoder
    x = torch.randn(*shape, 128, generator=torch.Generator().manual_seed(0))
    expected = [block(x) for block in encoder.blocks]
    for_any_frame(encoder)
    for block, near in zip(encoder.blocks, expected, strict=True):
        assert torch.allclose(block(x), near, atol=1e-6)


def test_an_encoder_whose_frames_cannot_be_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise torch.onnx.OnnxExporterError("step 1 of 3")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ConfigError, match=r"sam\.frame: found 'content', .* shape open .* to pad"):
        trace(torch.nn.Identity(), input_size=64, patch=16)


# --------------------------------------------------------------------------- the file


def test_what_the_model_says_of_itself(exported: Exported) -> None:
    model = onnx.load(exported.model)
    onnx.checker.check_model(model)
    identity = exported.torch.card.identity(label_size=32, precision="auto")
    sidecar = json.loads((exported.model.parent / "teacher.onnx.json").read_text())
    content = exported.model.read_bytes()
    assert sidecar["identity"] == identity.model_dump()
    assert sidecar["precision"] == "fp32"
    assert sidecar["files"] == {
        "teacher.onnx": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }
    assert not model.metadata_props
    (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
    assert sidecar["opset"] == opset == exported.said["opset"]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    batch = shapes["pixels"][0]
    assert isinstance(batch, str)
    assert shapes == {
        "pixels": [batch, 256, 256, 3],
        "valid_hw": [batch, 2],
        "masks": [batch, 32, 32],
        "confidences": [batch, 32, 32],
        "predicted_iou": [batch],
        "probabilities": [batch, 2, 32, 32],
        "iou": [batch, 2],
    }
    assert exported.said["model"] == str(exported.model)
    assert exported.said["weights"] is None
    assert exported.said["megabytes"] == exported.model.stat().st_size / 1e6
    assert str(Path(export.__file__).parent).encode() not in exported.model.read_bytes()


def test_weights_beside_the_model(timm: Timm, tmp_path: Path) -> None:
    path, batch = tmp_path / "t.onnx", images(SQUARE, WIDE)
    weights = timm.write(path, external_above=0)
    assert weights is not None
    sidecar = tmp_path / "t.onnx.json"
    assert sorted(tmp_path.iterdir()) == sorted([path, weights, sidecar])
    assert path.stat().st_size < weights.stat().st_size
    found = timm.load(path).label(batch, 48)
    assert_close(found, timm.torch.label(batch, 48))
    assert timm.write(path, external_above=0) == weights  # named by its content
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    ends = f"damaged, or not the file that t.onnx.json describes; {AGAIN}"
    assert str(caught.value) == f"{weights}: {ends}"
    weights.unlink()
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    assert str(caught.value) == f"{weights}: missing; t.onnx.json names it; {AGAIN}"
    assert timm.write(path) is None
    assert sorted(tmp_path.iterdir()) == [path, sidecar]


def test_an_export_that_stops_leaves_the_old_model(
    timm: Timm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.onnx"
    old = timm.write(path, external_above=0)
    assert old is not None
    (tmp_path / ".t.onnx.building").mkdir()  # a killed run's
    other = onnx_ir.from_proto(onnx_ir.to_proto(timm.graph))
    name, value = next(iter(other.graph.initializers.items()))
    assert value.const_value is not None
    changed = value.const_value.numpy() + 1
    value.const_value = onnx_ir.tensor(changed, name=name)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("write_json", "flush_tree"):  # before anything takes its place
        with monkeypatch.context() as patch:
            patch.setattr(export, place, stop)
            with pytest.raises(KeyboardInterrupt):
                write_model(path, other, timm.about(), external_above=0)
        timm.load(path)
    new = write_model(path, other, timm.about(), external_above=0)
    timm.load(path)
    assert new is not None
    assert new != old
    assert sorted(tmp_path.iterdir()) == sorted([path, new, tmp_path / "t.onnx.json"])


@pytest.mark.parametrize("external_above", [0, 1 << 29], ids=["weights beside it", "whole"])
def test_an_export_that_stops_before_its_sidecar_is_one_line(
    timm: Timm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external_above: int
) -> None:
    """The sidecar comes last: what it does not describe is not used."""
    path = tmp_path / "t.onnx"
    timm.write(path)
    real = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        if Path(target) == tmp_path / "t.onnx.json":
            raise KeyboardInterrupt
        real(source, target)

    other = onnx_ir.from_proto(onnx_ir.to_proto(timm.graph))
    other.graph.name = "another"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_model(path, other, timm.about(), external_above=external_above)
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    ends = f"damaged, or not the file that t.onnx.json describes; {AGAIN}"
    assert str(caught.value) == f"{path}: {ends}"
    write_model(path, other, timm.about(), external_above=1 << 29)
    timm.load(path)


@pytest.mark.parametrize("external_above", [0, 1 << 29], ids=["weights beside it", "whole"])
def test_a_disk_that_is_full(timm: Timm, tmp_path: Path, external_above: int) -> None:
    """The error names a file, and the model that was there stays."""
    path = tmp_path / "t.onnx"
    write_model(path, timm.graph, timm.about(), external_above=external_above)
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(OSError, match=str(tmp_path)) as caught:
            write_model(path, timm.graph, timm.about(seed=1), external_above=external_above)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename.startswith(str(tmp_path))
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_sha256": "b" * 64}, f"adapter_sha256 is {'b' * 64}, expected {'a' * 64}"),
        ({"label_size": 32}, "label_size is 32, expected 48"),
        ({"format": "0"}, f"format is 0, expected {backend.MODEL_FORMAT}"),
    ],
)
def test_a_stale_model(
    timm: Timm, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "t.onnx"
    timm.write(path, **changes)
    with pytest.raises(IdentityError) as caught:
        timm.load(path)
    assert str(caught.value) == f"{path}: {message}; {AGAIN}"


def test_no_model(timm: Timm, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        timm.load(tmp_path / "t.onnx")
    assert str(caught.value) == f"{tmp_path / 't.onnx'}: not found; run `samfed export-onnx` first"


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "longer"])
def test_a_damaged_model(timm: Timm, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.onnx"
    timm.write(path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:middle],
            "flip": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
            "longer": content + b"\0",
        }[damage]
    )
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    ends = f"damaged, or not the file that t.onnx.json describes; {AGAIN}"
    assert str(caught.value) == f"{path}: {ends}"


def test_a_model_without_its_sidecar(timm: Timm, tmp_path: Path) -> None:
    """As an earlier samfed's, which kept in the model what it is."""
    path, sidecar = tmp_path / "t.onnx", tmp_path / "t.onnx.json"
    timm.write(path)
    sidecar.unlink()
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    assert str(caught.value) == (
        f"{sidecar}: not found, and without it nothing says what t.onnx is (an earlier samfed's, "
        f"or copied alone?); {AGAIN}"
    )


def test_a_teacher_is_no_model_of_a_run(timm: Timm, tmp_path: Path) -> None:
    timm.write(tmp_path / "t.onnx")
    with pytest.raises(CorruptStoreError, match=r"no model of a run \(a teacher\?\)"):
        OnnxModel(tmp_path / "t.onnx", device="cpu")


@pytest.mark.parametrize("name", ["other.onnx", "../t.onnx"])
def test_a_sidecar_of_other_files(timm: Timm, tmp_path: Path, name: str) -> None:
    path, sidecar = tmp_path / "t.onnx", tmp_path / "t.onnx.json"
    timm.write(path)
    content = json.loads(sidecar.read_text())
    kept = content["files"] if name.startswith("..") else {}
    write_json(sidecar, {**content, "files": {**kept, name: content["files"]["t.onnx"]}})
    with pytest.raises(CorruptStoreError) as caught:
        timm.load(path)
    assert str(caught.value) == f"{sidecar}: does not describe t.onnx; {AGAIN}"


def test_a_bad_byte_anywhere_in_a_sidecar_is_one_line(timm: Timm, tmp_path: Path) -> None:
    """Where it says nothing that matters (the version, the opset), the model is taken."""
    path, sidecar = tmp_path / "t.onnx", tmp_path / "t.onnx.json"
    timm.write(path)
    content, refused = sidecar.read_bytes(), 0
    for place in range(0, len(content), 7):
        sidecar.write_bytes(content[:place] + b"\0" + content[place + 1 :])
        with suppress(CorruptStoreError, IdentityError):
            backend.check_file(path, timm.card, label_size=48, precision="auto")
            continue
        refused += 1
    assert refused > len(content) // 7 * 0.9
    for bad in (b"", b"[]", b"{}", b"\xff", content[:-9], content.replace(b"fp32", b"fp64")):
        sidecar.write_bytes(bad)
        with pytest.raises(CorruptStoreError) as caught:
            timm.load(path)
        assert str(caught.value) == f"{sidecar}: damaged, or not written by samfed; {AGAIN}"


# --------------------------------------------------------------------------- device, precision


def test_where_it_runs_is_recorded(timm: Timm, tmp_path: Path) -> None:
    timm.write(tmp_path / "t.onnx")
    teacher = timm.load(tmp_path / "t.onnx")
    found = teacher.provenance()
    assert found.pop("samfed")
    assert found == {
        "backend": "onnx",
        "provider": CPU,
        "precision": "fp32",
        "device": "cpu",
        "onnxruntime": ort.__version__,
    }
    threads = teacher.session.get_session_options().intra_op_num_threads
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp16"])
def test_a_precision_that_the_model_does_not_have(
    timm: Timm, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "t.onnx"
    timm.write(path)
    with pytest.raises(ConfigError) as caught:
        timm.load(path, precision=precision)
    assert (
        str(caught.value)
        == {
            "bf16": "precompute.precision: bf16 is not offered by the onnx backend; use fp32 "
            "or, on CUDA, fp16",
            "int8": "precompute.precision: int8 is not offered by the onnx backend; use fp32 "
            "or, on CUDA, fp16",
            "fp16": f"precompute.precision: 'fp16' asked for, but {path} holds fp32; {AGAIN}",
        }[precision]
    )


def test_fp16_needs_cuda(timm: Timm, tmp_path: Path) -> None:
    path = tmp_path / "t.onnx"
    timm.write(path, precision="fp16")
    with pytest.raises(ConfigError, match="holds fp16, which needs a CUDA device"):
        timm.load(path, precision="fp16")
    # where nothing is asked for, a timm: teacher's labels are those of fp32
    with pytest.raises(IdentityError, match="precision is fp16, expected fp32"):
        timm.load(path)


@pytest.fixture(params=["no provider", "no libraries"])
def no_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine where torch finds CUDA and ONNX Runtime does not: a build without, or no cuDNN."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    providers = [CPU] if request.param == "no provider" else [CUDA, CPU]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    start = ort.InferenceSession

    def start_on_cpu(path: Path, options: Any, **more: Any) -> ort.InferenceSession:
        """What ONNX Runtime does where libraries are missing: it logs, and goes on."""
        return start(path, options, **{**more, "providers": [CPU]})

    monkeypatch.setattr(ort, "InferenceSession", start_on_cpu)
    expected = {"no provider": "is a build without it", "no libraries": "cannot load its CUDA"}
    return expected[request.param]


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_asked_for_and_not_there(
    timm: Timm, tmp_path: Path, no_cuda: str, device: str
) -> None:
    timm.write(tmp_path / "t.onnx")
    with pytest.raises(ConfigError) as caught:
        timm.load(tmp_path / "t.onnx", device=device)
    assert str(caught.value).startswith("precompute.device: cuda asked for, but onnxruntime ")
    assert no_cuda in str(caught.value)


def test_auto_says_that_it_takes_the_cpu(
    timm: Timm, tmp_path: Path, no_cuda: str, caplog: pytest.LogCaptureFixture
) -> None:
    timm.write(tmp_path / "t.onnx")
    with caplog.at_level(logging.WARNING, "samfed"):
        teacher = timm.load(tmp_path / "t.onnx", device="auto")
    assert no_cuda in caplog.text
    assert "labelling on the CPU" in caplog.text
    assert (teacher.provenance()["device"], teacher.provenance()["provider"]) == ("cpu", CPU)


class Machine:
    """A machine with CUDA, as ONNX Runtime says; its sessions run on the CPU all the same."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []  # each session's providers, and whether only these
        self.refuses = False  # a session where a node would go to the CPU
        self._start = ort.InferenceSession

    def start(self, path: Path, options: Any, *, providers: list[Any], **more: Any) -> Any:
        names = [name if isinstance(name, str) else name[0] for name in providers]
        only = False
        with suppress(RuntimeError):  # the entry is not set
            only = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self.asked.append([*names, "only"] if only else names)
        if only and self.refuses:
            raise RuntimeError("nodes are assigned to the CPU, but fallback to it was disabled")
        session = self._start(path, ort.SessionOptions(), providers=[CPU], **more)
        session.get_providers = lambda: names
        return session


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: found.asked.append(["preloaded"]))
    monkeypatch.setattr(ort, "InferenceSession", found.start)
    return found


@pytest.mark.parametrize("refuses", [False, True])
def test_nodes_that_cuda_does_not_run_are_told(
    timm: Timm, tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    """None goes to the CPU without a word."""
    path, machine.refuses = tmp_path / "t.onnx", refuses
    timm.write(path)
    with caplog.at_level(logging.WARNING, "samfed"):
        session, _ = backend.start_session(path, "cuda")
    assert session.get_providers()[0] == CUDA
    again = [[CUDA, CPU]] if refuses else []
    assert machine.asked == [["preloaded"], [CUDA, "only"], *again]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(", which")[0] for line in lines] == [
        f"{path}: onnxruntime {ort.__version__} runs some of its nodes on the CPU"
    ] * refuses


def test_what_auto_exports(machine: Machine) -> None:
    """fp16 for CUDA, but where it moves masks, as with every encoder of convolutions."""
    assert auto_precision("vit_b", "auto") == auto_precision("vit_b", "cuda:0") == "fp16"
    assert auto_precision("vit_b", "cpu") == auto_precision(BACKBONE, "auto") == "fp32"


def test_a_model_that_onnxruntime_cannot_run(timm: Timm, tmp_path: Path) -> None:
    path = tmp_path / "t.onnx"
    graph = onnx_ir.from_proto(onnx_ir.to_proto(timm.graph))
    graph.graph[0].op_type = "NoSuchOperator"
    write_model(path, graph, timm.about(), external_above=1 << 29)
    with pytest.raises(ConfigError) as caught:
        timm.load(path)
    assert str(caught.value).startswith(f"{path}: onnxruntime {ort.__version__} cannot run it (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 8\nmore", MemoryError),
        ("std::bad_alloc", MemoryError),
        ("Invalid shape", RuntimeError),
    ],
)
def test_a_batch_too_large(timm: Timm, tmp_path: Path, message: str, kind: type[Exception]) -> None:
    """The caller is told of missing memory, and of nothing else, by MemoryError."""
    timm.write(tmp_path / "t.onnx")
    teacher = timm.load(tmp_path / "t.onnx")

    def fail(binding: object) -> None:
        raise RuntimeError(message)

    session: Any = SimpleNamespace(io_binding=teacher.session.io_binding, run_with_iobinding=fail)
    teacher.session = session
    with pytest.raises(kind) as caught:
        teacher.label(images(SQUARE), 48)
    assert str(caught.value) == message.splitlines()[0]


def test_labels_of_another_size(timm: Timm, tmp_path: Path) -> None:
    timm.write(tmp_path / "t.onnx")
    with pytest.raises(IdentityError, match="makes labels of 48 px, not 32"):
        timm.load(tmp_path / "t.onnx").label(images(SQUARE), 32)


# --------------------------------------------------------------------------- the commands


def test_a_store_made_by_onnx_is_one_made_by_torch(exported: Exported, project: Project) -> None:
    made = answer("precompute-sam", "--backend", "onnx", *project.options)
    assert made["labelled"] > 0
    assert (made["already_labelled"], made["failed"], made["notices"]) == (0, [], [])
    stores = sorted((project.cache / "sam").glob("*.zarr"))
    by_onnx = {path.name: LabelStore(path) for path in stores}
    for store in by_onnx.values():
        assert [[record["backend"] for record in shard] for shard in store.provenance()] == [
            ["onnx"]
        ]
    labels = {name: store.read() for name, store in by_onnx.items()}
    again = answer("precompute-sam", *project.options)
    assert (again["labelled"], again["already_labelled"], again["notices"]) == (
        0,
        made["labelled"],
        [],
    )
    shutil.rmtree(project.cache / "sam")
    answer("precompute-sam", "--set", "precompute.precision=fp32", *project.options)
    for path in stores:
        by_torch = LabelStore(path)
        assert by_torch.identity == by_onnx[path.name].identity
        assert_close(labels[path.name], by_torch.read())


def test_onnx_on_a_dask_worker(project: Project) -> None:
    """A worker that loads the model by itself writes the same bytes."""
    config = load_config(project.params, ("precompute.backend=onnx", "precompute.threads=1"))
    precompute(config, clients=["site_a"])
    here = listing(project.cache / "sam")
    assert LabelStore(project.cache / "sam" / "site_a.zarr").provenance()[0][0]["backend"] == "onnx"
    shutil.rmtree(project.cache / "sam")
    with thread_workers() as workers:
        result = precompute(config, clients=["site_a"], cluster=on_workers(workers))
    assert (result.already_labelled, result.failed) == (0, [])
    assert listing(project.cache / "sam") == here


def test_commands_before_the_ones_they_need(project: Project) -> None:
    model = project.cache / "onnx" / "teacher.onnx"
    onnx_backend = ("--set", "precompute.backend=onnx", *project.options)
    line = fails(5, "precompute-sam", "--set", "data.image_size=64", *onnx_backend)
    assert line == f"{model}: label_size is 32, expected 64; {AGAIN}"
    model.unlink()
    line = fails(4, "precompute-sam", *onnx_backend)
    assert line == f"{model}: not found; run `samfed export-onnx` first"
    shutil.rmtree(project.cache / "teacher")
    for command in (("export-onnx",), ("precompute-sam", "--backend", "onnx")):
        line = fails(4, *command, *project.options)
        assert line.endswith("card.json: not found; run `samfed finetune-sam` first")


def test_bad_options_of_the_commands(project: Project) -> None:
    line = fails(2, "precompute-sam", "--backend", "tensorrt", *project.options)
    assert "precompute.backend: found 'tensorrt', expected 'torch' or 'onnx'" in line
    line = fails(2, "export-onnx", "--set", "precompute.precision=bf16", *project.options)
    assert line.startswith("precompute.precision: bf16 is not offered by the onnx backend")
    lock = project.cache / "locks" / "export-onnx.lock"
    with writer_lock(lock):
        line = fails(5, "export-onnx", *project.options)
    assert line.startswith(f"{lock}: process ")


def test_the_model_goes_to_a_site_with_the_teacher(exported: Exported, tmp_path: Path) -> None:
    file, site = tmp_path / "teacher.samfed", Project(tmp_path)
    answer("teacher", "export", file, "--onnx", *exported.options)
    answer("prepare", "--site", "north", "--data", exported.images, *site.options)
    answer("teacher", "import", file, *site.options)
    assert digest(site.cache / "onnx") == digest(exported.cache / "onnx")
    here = (*site.options, "--set", f"data.root={exported.images}")
    done = answer("precompute-sam", "--backend", "onnx", *here)
    count = len(load_partition(site.cache / "partition.json").clients["north"].train)
    assert (done["labelled"], done["failed"]) == (count, [])
