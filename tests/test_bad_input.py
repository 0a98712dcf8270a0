"""Unusable input of every kind, through the command line: one line that helps, and no trace of it.

Cases that ``test_cli.py`` has (a missing folder, a damaged image, ``vit_b`` without its checkpoint,
a stage whose input was deleted) are not repeated here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Project, answer, call, fails, listing
from PIL import Image


@pytest.fixture(scope="module")
def prepared(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after ``samfed prepare``; tests only read it."""
    project = Project(tmp_path_factory.mktemp("prepared"))
    shutil.copytree(tiny_images, project.images)
    answer("prepare", *project.options)
    return project


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    """A copy of the prepared project that a test may change."""
    copy = Project(tmp_path)
    shutil.copytree(prepared.cache, copy.cache)
    shutil.copytree(prepared.images, copy.images)
    return copy


def refused(project: Project, code: int, *arguments: object) -> str:
    """The one line of a command that must fail and leave the project's folder as it was."""
    before = lasting(project)
    text = fails(code, *arguments, *project.options)
    assert lasting(project) == before
    return text


def lasting(project: Project) -> dict[str, bytes]:
    """Every file and its bytes, but no free lock: that is an empty file, left on purpose."""
    found = listing(project.folder)
    return {k: v for k, v in found.items() if v or not k.startswith("cache/locks/")}


def with_setting(project: Project, section: str, key: str, value: object) -> None:
    raw = yaml.safe_load(project.params.read_text())
    raw[section][key] = value
    project.params.write_text(yaml.safe_dump(raw))


# --------------------------------------------------------------------------- settings


def test_an_unknown_key(project: Project) -> None:
    with_setting(project, "cache", "rot", "cache")
    assert refused(project, 2, "prepare") == (
        f"{project.params}: unknown key 'cache.rot' (nearest: cache.root); expected one of root"
    )


@pytest.mark.parametrize("stage", ["synth", "prepare", "federate"])
def test_an_ill_typed_value(project: Project, stage: str) -> None:
    with_setting(project, "federate", "rounds", "many")
    out = [project.folder / "out"] if stage == "synth" else []
    text = refused(project, 2, stage, *out)
    assert text.startswith(f"{project.params}: federate.rounds: found 'many', ")
    assert text.endswith("expected a whole number")


def test_more_clients_than_images(project: Project) -> None:
    with_setting(project, "partition", "scheme", "iid")
    with_setting(project, "partition", "clients", 500)
    text = refused(project, 2, "prepare")
    assert text.startswith("partition.clients: 500 clients, but only ")
    assert text.endswith(" groups are left after the server's; lower it")


# --------------------------------------------------------------------------- images


def test_no_images(project: Project) -> None:
    for path in (project.images / "images").iterdir():
        path.unlink()
    (project.images / "images" / "notes.txt").write_text("nothing here")
    assert refused(project, 3, "prepare") == (
        f"{project.images}/images: no images found; expected .png .jpg .jpeg .tif .tiff .bmp files"
    )


def test_a_mask_of_another_size(project: Project) -> None:
    path = project.images / "masks" / "site_a_0002.png"
    with Image.open(path) as mask:
        mask.resize((20, 30)).save(path)
    assert refused(project, 3, "prepare") == (
        f"{path}: mask is 20 x 30 pixels, its image is 48 x 48; they must be equal"
    )


def test_two_images_with_one_id(project: Project) -> None:
    first = project.images / "images" / "site_a_0002.png"
    # in name order the .jpg comes first, so the .png is the one too many
    with Image.open(first) as image:
        image.save(first.with_suffix(".jpg"))
    assert refused(project, 3, "prepare") == (
        f"{first}: a second image with id 'site_a_0002' beside site_a_0002.jpg; "
        "rename or remove one"
    )


# --------------------------------------------------------------------------- weights


def test_a_timm_backbone_without_its_checkpoint(project: Project) -> None:
    missing = project.folder / "backbone.safetensors"
    with_setting(project, "sam", "variant", "timm:mobilenetv3_small_050")
    with_setting(project, "sam", "checkpoint", str(missing))
    assert refused(project, 3, "finetune-sam") == (
        f"{missing}: no such checkpoint; check sam.checkpoint in params.yaml"
    )


def test_a_timm_checkpoint_that_cannot_be_read(project: Project) -> None:
    damaged = project.folder / "backbone.safetensors"
    damaged.write_bytes(b"not weights")
    with_setting(project, "sam", "variant", "timm:mobilenetv3_small_050")
    with_setting(project, "sam", "checkpoint", str(damaged))
    text = refused(project, 3, "finetune-sam")
    assert text.startswith(f"{damaged}: not a readable checkpoint (")
    assert text.endswith("; expected safetensors or a torch file of plain tensors")


@pytest.fixture(params=["missing", "damaged"])
def encoder_weights(request: pytest.FixtureRequest, project: Project) -> Path:
    """What ``model.encoder_weights`` names; the project is set to use it."""
    path = project.folder / "encoder.safetensors"
    if request.param == "damaged":
        path.write_bytes(b"not weights")
    with_setting(project, "federate", "method", "supervised")
    with_setting(project, "model", "encoder_weights", str(path))
    return path


def test_unusable_encoder_weights_are_named(project: Project, encoder_weights: Path) -> None:
    kind = "not a readable safetensors file (" if encoder_weights.exists() else "no such file"
    text = fails(3, "federate", *project.options)
    assert text.startswith(f"{encoder_weights}: {kind}")


def test_unusable_encoder_weights_leave_no_run(project: Project, encoder_weights: Path) -> None:
    refused(project, 3, "federate")


# --------------------------------------------------------------------------- damaged small files


@pytest.mark.parametrize("stage", ["finetune-sam", "precompute-sam", "federate"])
@pytest.mark.parametrize("digest", ["x" * 64, "0" * 10, 7, None])
def test_a_damaged_digest_in_the_partition(project: Project, stage: str, digest: object) -> None:
    path = project.cache / "partition.json"
    raw = json.loads(path.read_text())
    image_id = raw["server"]["train"][0]
    raw["images"][image_id]["image_sha256"] = digest
    path.write_text(json.dumps(raw))
    text = refused(project, 3, stage)
    assert text.startswith(f"{path}: images.{image_id}.image_sha256: ")
    assert text.endswith("; expected a samfed partition; delete it and run `samfed prepare`")
    shown = call("cache", "info", *project.options)  # what can be shown all the same is
    assert (shown.exit_code, shown.stdout) == (3, "no label store\n")
    assert text in shown.stderr


def test_settings_with_a_date_that_does_not_exist(project: Project) -> None:
    project.params.write_text("seed: 2024-99-99\n")
    assert refused(project, 2, "prepare") == (
        f"{project.params}: seed: found '2024-99-99', expected a whole number"
    )


# --------------------------------------------------------------------------- too early


@pytest.mark.parametrize(
    ("stage", "file", "needed"),
    [
        ("finetune-sam", "partition.json", "prepare"),
        ("evaluate-sam", "partition.json", "prepare"),
        ("precompute-sam", "partition.json", "prepare"),
        ("federate", "partition.json", "prepare"),
        ("evaluate", "runs/sam_fed/params.yaml", "federate"),
        ("report", "runs/sam_fed/params.yaml", "federate"),
    ],
)
def test_any_stage_on_a_fresh_checkout(tmp_path: Path, stage: str, file: str, needed: str) -> None:
    """Not even the cache folder is made."""
    project = Project(tmp_path)
    text = refused(project, 4, stage)
    assert text == f"{project.cache}/{file}: not found; run `samfed {needed}` first"
    assert not project.cache.exists()


@pytest.mark.parametrize(
    ("stage", "file", "needed"),
    [
        ("evaluate-sam", "teacher/card.json", "finetune-sam"),
        ("precompute-sam", "teacher/card.json", "finetune-sam"),
        ("evaluate", "runs/sam_fed/params.yaml", "federate"),
        ("report", "runs/sam_fed/params.yaml", "federate"),
    ],
)
def test_any_stage_right_after_prepare(
    project: Project, stage: str, file: str, needed: str
) -> None:
    text = refused(project, 4, stage)
    assert text == f"{project.cache}/{file}: not found; run `samfed {needed}` first"


def test_rounds_right_after_prepare(project: Project) -> None:
    text = refused(project, 4, "federate")
    assert text.startswith(f"{project.cache}/")
    assert ": not found; run `samfed " in text
