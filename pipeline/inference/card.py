"""The model card: one Markdown page with the hub's header that says what a model is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import DataError, StageError
from pipeline.federation.runs import RunFolder
from pipeline.segmentation.model_spec import ModelSpec
from pipeline.segmentation.networks import smp_arguments
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard, load_card

_VERSIONS = ("samfed", "torch", "segmentation-models-pytorch", "timm", "onnxruntime-gpu")
_SCORES = {"dice": ".3f", "iou": ".3f", "hd95": ".1f"}
_HEADER = {
    "library_name": "segmentation-models-pytorch",
    "pipeline_tag": "image-segmentation",
    "license": "unknown",
    "tags": ["medical", "federated-learning", "semi-supervised", "segmentation", "samfed"],
    "metrics": ["dice"],
}

_USE = """\
## Use

    samfed predict model.onnx images/ --out masks/

Without torch: `model.onnx` takes `pixels` (B, H, W, 3) uint8 RGB of any size, and gives `mask`
(B, H, W), `probabilities` (B, K+1, H, W) and `distance` (B,). Resizing and temperature are inside.
With segmentation-models-pytorch:

    import safetensors.torch, segmentation_models_pytorch as smp
    model = smp.create_model("{architecture}", "{encoder}", None, **{arguments})
    {group_norm}model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
    # RGB images (B, 3, {size}, {size}) in -1..1 in; softmax(model(images) / {temperature}) out

## Intended use and limits

For research. Not a medical device: no mask may decide about a patient. The model knows the kind of
images, the scanners and the patients of the sites that trained it. An image whose `distance` is
above {threshold:.3g} looks unlike theirs, as about one in twenty of the widest site's own do; its
mask is not to be trusted. The scores below hold for the sites tested there alone. A confidence is a
probability by pixel, not of the mask as a whole.
"""
_GROUP_NORM = """\
from pipeline.segmentation.networks import with_group_norm  # of samfed
    model = with_group_norm(model)
    """
_HEAD = """\
## Scores

| test | images | Dice (95 % interval) | IoU | HD95 px |
|---|---|---|---|---|"""


def model_card(spec: ModelSpec, run: RunFolder | None) -> str:
    """Return the card of a model, as far as its run's folder tells more than its spec.

    Raises:
        DataError: a file of the run is damaged.
    """
    header = yaml.safe_dump(_HEADER, sort_keys=False)
    use = _USE.format(
        architecture=spec.network.architecture,
        encoder=spec.network.encoder,
        arguments=smp_arguments(spec.network, num_classes=spec.num_classes),
        group_norm=_GROUP_NORM if spec.network.normalisation == "group" else "",
        size=spec.image_size,
        temperature=spec.temperature,
        threshold=spec.likeness.threshold,
    )
    title = f"# {spec.network.architecture} with {spec.network.encoder}, {spec.training.method}"
    parts = [f"---\n{header}---\n\n{title}\n", *_origin(spec, run), use]
    if run is not None:
        parts += _scores(run)
    return "\n".join([*parts, *_calibration(spec), *_digests(spec, run)])


def _origin(spec: ModelSpec, run: RunFolder | None) -> Iterator[str]:
    made, classes = spec.training, spec.num_classes
    whose = f"client {made.client}'s own model" if made.client else "the global model"
    numbered = f"classes 1 to {classes}" if classes > 1 else "class 1"
    yield (
        f"Segments {', '.join(spec.class_names)} ({numbered}; 0 is background) in "
        f"{'grey' if spec.grey else 'colour'} images of {spec.image_size} x {spec.image_size} px. "
        f"It is {whose}.\n\n## Data and method\n\n"
        f"* {made.public_images} labelled images of one institution; {made.images} unlabelled "
        f"images of {made.clients} client{'s' if made.clients > 1 else ''}, which never left them\n"
        f"* method `{made.method}`, {made.rounds} rounds, seed {made.seed}"
    )
    if made.epsilon is not None:
        yield (
            f"* differential privacy of each client: epsilon {made.epsilon:.3g} at delta "
            f"{made.delta:g}"
        )
    teacher = None if run is None else _teacher(run)
    if teacher is not None:
        yield f"* teacher {teacher.variant}, prompt {teacher.prompt}"
    yield ""


def _teacher(run: RunFolder) -> TeacherCard | None:
    """Return the card of the teacher in the run's cache, if both are still there."""
    try:
        folder = run.config().cache.root / "teacher"
    except StageError:
        return None
    return load_card(folder) if (folder / CARD_FILE).is_file() else None


def _scores(run: RunFolder) -> Iterator[str]:
    """Yield a table of the internal test and of each external one."""
    found = {"internal test": _read(run.path / "metrics.json")}
    for path in sorted((run.path / "external").glob("*.json")):
        found[f"external: {path.stem}"] = _read(path)
    yield _HEAD
    for name, test in found.items():
        row = {} if test is None else test["test"]["pooled"]
        if not row.get("n"):
            yield f"| {name} | none | | | |"
            continue
        dice, iou, hd95 = (format(row[key], form) for key, form in _SCORES.items())
        interval = row["dice_ci95"]
        between = "one group" if interval is None else "{:.3f} to {:.3f}".format(*interval)
        yield f"| {name} | {row['n']} | {dice} ({between}) | {iou} | {hd95} |"
    yield ""


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["test"]["pooled"]["n"]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: no scores ({error}); run `samfed evaluate` again") from error
    return found


def _calibration(spec: ModelSpec) -> Iterator[str]:
    found = spec.calibration
    yield "## Calibration\n"
    yield (
        f"On {found.images} labelled images that nobody trained on: expected calibration error "
        f"{found.ece_before:.3f} as trained, {found.ece:.3f} with the temperature "
        f"{spec.temperature:.3g}, each half measured with the other half's temperature.\n"
    )


def _digests(spec: ModelSpec, run: RunFolder | None) -> Iterator[str]:
    yield "## Versions and digests\n"
    yield from (f"* {name} {version(name)}" for name in _VERSIONS if _is_installed(name))
    yield f"* weights sha256 `{spec.weights_sha256}`"
    if run is not None and (checkpoint := run.load_checkpoint()) is not None:
        yield f"* partition sha256 `{checkpoint.partition}`"
        yield f"* settings, data and labels sha256 `{checkpoint.fingerprint}`"
    yield ""


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
