"""``samfed init``: what it finds in a folder, and that its settings work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import answer, call, fails
from PIL import Image

from pipeline.config import AugmentConfig
from pipeline.params import load_config
from pipeline.setup.init import WEIGHTS


@pytest.fixture
def folder(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, beside which commands run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "my images #1")
    return tmp_path / "my images #1"


def test_what_it_writes_is_read_and_prepare_runs_on_it(folder: Path) -> None:
    said = answer("init", folder)
    config = load_config(Path("params.yaml"))
    assert said["file"] == "params.yaml"
    assert "colour" in said["found"]
    assert config.augment == AugmentConfig()
    assert config.data.root == Path(folder.name)
    assert (config.data.num_classes, config.data.image_size) == (1, 96)
    assert (config.partition.scheme, config.sam.variant) == ("site", "vit_t")
    assert set(answer("prepare")) >= {"server", "site_a", "site_b", "site_c", "site_d"}


def test_clients_are_few_enough_for_the_patients(folder: Path) -> None:
    rows = [
        f"{path.stem},a,p{i // 2}" for i, path in enumerate(sorted((folder / "images").iterdir()))
    ]
    (folder / "sites.csv").write_text("\n".join(["image_id,site,group", *rows]) + "\n")
    answer("init", folder)
    assert load_config(Path("params.yaml")).partition.clients == 2
    assert set(answer("prepare")) >= {"server", "client_00", "client_01"}


@pytest.mark.parametrize("small", ["a", "b"])
def test_a_site_that_is_left_with_a_single_group_is_no_client(folder: Path, small: str) -> None:
    """One patient cannot be split into parts. At a, the server's site, it is too big for that."""
    rows = []
    for i, path in enumerate(sorted((folder / "images").iterdir())):
        site = "b" if i % 3 == 0 else "a"
        big = site == small and (i % 2 or site == "b")
        rows.append(f"{path.stem},{site},{'big' if big else i}")
    (folder / "sites.csv").write_text("\n".join(["image_id,site,group", *rows]) + "\n")
    answer("init", folder)
    config = load_config(Path("params.yaml"))
    assert (config.partition.scheme, config.partition.server_site) == ("iid", None)
    assert "server" in answer("prepare")


def test_too_few_images_for_any_partition(folder: Path) -> None:
    rows = [f"{path.stem},a,only" for path in (folder / "images").iterdir()]
    (folder / "sites.csv").write_text("\n".join(["image_id,site,group", *rows]) + "\n")
    assert fails(3, "init", folder).startswith(f"{folder}: no partition fits these images; ")
    assert not Path("params.yaml").exists()


def test_a_file_that_is_there_is_kept(folder: Path) -> None:
    Path("params.yaml").write_text("seed: 3\n")
    assert fails(2, "init", folder) == (
        "params.yaml: exists already; give --force to replace it, or another --out"
    )
    assert Path("params.yaml").read_text() == "seed: 3\n"
    assert call("init", folder, "--force").exit_code == 0
    assert load_config(Path("params.yaml")).data.root == Path(folder.name)
    assert call("init", folder, "--out", "sub/other.yaml").exit_code == 0
    assert load_config(Path("sub/other.yaml")).data.root == Path(folder.name)


def test_classes_grey_images_one_site_and_the_names_of_masks(folder: Path) -> None:
    (folder / "sites.csv").unlink()
    for path in (folder / "images").iterdir():
        Image.open(path).convert("L").save(path)
    for path in (folder / "masks").iterdir():
        shape = np.asarray(Image.open(path)) > 0
        shape = shape * np.uint8(3)
        shape[0, :2] = (1, 2)
        Image.fromarray(shape).save(path.with_name(f"{path.stem}_segmentation.png"))
        path.unlink()
    said = answer("init", folder)
    config = load_config(Path("params.yaml"))
    assert said["found"].endswith("; grey")
    assert config.data.num_classes == 3
    assert (config.augment.flips, config.augment.turns) == ("none", False)
    assert (
        "and mostly left and right differ; horizontal if they do not"
        in Path("params.yaml").read_text()
    )
    assert config.federate.average_rounds == 3
    assert config.data.mask_pattern.startswith("{id}_segmentation")
    assert (config.partition.scheme, config.partition.server_site) == ("iid", None)
    assert call("prepare").exit_code == 0


def test_weights_that_are_there_are_used(folder: Path) -> None:
    WEIGHTS.mkdir(parents=True)
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite2"):
        (WEIGHTS / f"{name}.safetensors").write_bytes(b"")
    call("init", folder, "--out", "study/params.yaml")
    config = load_config(Path("study/params.yaml"))
    assert config.model.encoder_weights == WEIGHTS / "tf_efficientnet_lite0.safetensors"
    assert config.sam.checkpoint == WEIGHTS / "tf_efficientnet_lite2.safetensors"
    assert config.sam.variant == "timm:tf_efficientnet_lite2"


def test_a_folder_without_masks_or_in_another_layout(folder: Path) -> None:
    shutil.rmtree(folder / "masks")
    assert "no image has a mask" in fails(3, "init", folder)
    shutil.rmtree(folder / "images")
    assert "expected images/ and masks/ in it" in fails(3, "init", folder)
    (folder / "scan.nii.gz").write_bytes(b"")
    text = fails(3, "init", folder)
    assert f"this looks like nifti: run `samfed import nifti {folder} OUT` first" in text
    assert not Path("params.yaml").exists()
