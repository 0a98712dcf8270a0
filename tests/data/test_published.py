"""Splits that HSSF published are read as partitions, and what is missing is named with counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from pipeline.config import Config
from pipeline.data.partition import ImageEntry, Partition, load_partition
from pipeline.data.prepare import prepare
from pipeline.data.published import read_published
from pipeline.errors import ConfigError, DataError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from split_files import write_files

Split = dict[str, dict[str, list[str]]]

SITES = {"CVC-ColonDB": "cvc_colondb", "CVC-ClinicDB": "cvc_clinicdb", "EndoTect-ETIS": "etis"}


def names(first: int, last: int) -> list[str]:
    return [f"{number}.png" for number in range(first, last + 1)]


def split() -> Split:
    """Three domains whose images have the same names, as HSSF's polyps."""
    client = {"labeled_train": list[str](), "unlabeled_train": names(1, 6)}
    return {
        "CVC-ColonDB": {"labeled_train": names(1, 10)},
        "CVC-ClinicDB": client | {"val_list": names(7, 8), "test_list": names(9, 10)},
        "EndoTect-ETIS": client | {"val_list": names(7, 7), "test_list": names(8, 10)},
    }


def entry(image_id: str, site: str, group: str = "") -> ImageEntry:
    """An image with a mask; its digest follows from its id."""
    digest = f"{sum(image_id.encode()):x}{len(image_id):x}".rjust(64, "0")
    return ImageEntry(
        image=f"images/{image_id}.png",
        mask=f"masks/{image_id}.png",
        site=site,
        group=f"{site}/{group or image_id}",
        image_sha256=digest,
        mask_sha256=digest,
    )


def entries(split: Split, *, named: bool = True) -> dict[str, ImageEntry]:
    """The images of a split, each id with its site in front, or with the site in the table."""
    found = {}
    for domain, lists in split.items():
        for file in sorted(file for files in lists.values() for file in files):
            image_id = f"{SITES[domain]}_{file.removesuffix('.png')}"
            found[image_id] = entry(image_id, "site" if named else SITES[domain])
    return found


def config(**partition: Any) -> Config:
    return tiny_config(Path("data"), Path("cache"), partition=partition)


def read(path: Path, split: object, images: dict[str, ImageEntry]) -> Partition:
    path.write_text(json.dumps(split))
    return read_published(path, images, config())


def refusal(path: Path, split: object, images: dict[str, ImageEntry]) -> str:
    with pytest.raises(DataError) as caught:
        read(path, split, images)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "polyp-[1, 0.0].json"


@pytest.mark.parametrize("named", [True, False])
def test_a_split_whose_domains_share_names(path: Path, named: bool) -> None:
    found = read(path, split(), entries(split(), named=named))
    assert {name: [len(ids) for _, ids in part] for name, part in found.clients.items()} == {
        "CVC-ClinicDB": [6, 2, 2],
        "EndoTect-ETIS": [6, 1, 3],
    }
    assert found.clients["CVC-ClinicDB"].test == ("cvc_clinicdb_10", "cvc_clinicdb_9")
    assert found.clients["EndoTect-ETIS"].val == ("etis_7",)
    assert sorted((*found.server.train, *found.server.calibration)) == sorted(
        f"cvc_colondb_{number}" for number in range(1, 11)
    )
    assert len(found.server.calibration) == 2  # calibration_min
    assert (found.scheme, found.seed, len(found.images)) == ("hssf", 0, 30)


def test_the_calibration_part_follows_the_seed(path: Path) -> None:
    path.write_text(json.dumps(split()))
    images = entries(split())
    drawn = {
        seed: read_published(path, images, config().model_copy(update={"seed": seed})).server
        for seed in range(4)
    }
    assert drawn[0] == read_published(path, images, config()).server
    assert len({server.calibration for server in drawn.values()}) > 1


def test_the_calibration_part_has_several_patients(path: Path) -> None:
    """The public set is of two videos and of two images alone."""
    images = entries(split())
    videos = {f"cvc_colondb_{number}": f"video{number % 2}" for number in range(1, 9)}
    images |= {i: images[i].model_copy(update={"group": video}) for i, video in videos.items()}
    found = read(path, split(), images)
    assert len({images[image_id].group for image_id in found.server.calibration}) == 2


def test_unique_names_need_no_site(path: Path) -> None:
    """As HSSF's skin lesions: the file's name is the id."""
    one = {"public": {"labeled_train": [f"ISIC_{n}.jpg" for n in range(10)]}}
    two = {"labeled_train": [], "unlabeled_train": ["ISIC_20.jpg"], "val_list": []}
    raw = one | {"domain1": two | {"test_list": ["ISIC_21.jpg"]}}
    images = {f"ISIC_{n}": entry(f"ISIC_{n}", "isic") for n in (*range(10), 20, 21, 99)}
    found = read(path, raw, images)
    assert found.clients["domain1"].train == ("ISIC_20",)
    assert "ISIC_99" not in found.images


def test_what_is_missing_is_counted(path: Path) -> None:
    images = entries(split())
    for image_id in ("etis_1", "etis_9", "cvc_colondb_3"):
        del images[image_id]
    assert refusal(path, split(), images) == (
        "3 of 30 images are not in data.root (1 of 10 of CVC-ColonDB, 2 of 10 of EndoTect-ETIS), "
        "e.g. 3.png of CVC-ColonDB; images are found by name, and by site where several domains "
        "have a name"
    )


def test_a_name_that_may_be_two_images(path: Path) -> None:
    images = entries(split()) | {"endotect_4": entry("endotect_4", "site")}
    assert refusal(path, split(), images) == (
        "4.png of EndoTect-ETIS may be etis_4 or endotect_4; tell them apart by a site "
        "'EndoTect-ETIS' in sites.csv"
    )


def test_an_image_that_would_be_in_two_domains(path: Path) -> None:
    images = {f"cvc_{n}": entry(f"cvc_{n}", "cvc") for n in range(1, 11)}
    images |= {f"etis_{n}": entry(f"etis_{n}", "etis") for n in range(1, 11)}
    text = refusal(path, split(), images)
    assert text.startswith("image cvc_")
    assert " is in server " in text
    assert " and in CVC-ClinicDB " in text


def test_groups_of_several_parts_are_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = entries(split())
    for number in (5, 6, 7):
        image_id = f"etis_{number}"
        images[image_id] = entry(image_id, "site", "video")
    images["etis_2"] = entry("etis_2", "site", "whole")
    found = read(path, split(), images)
    assert found.images["etis_7"].group == "site/etis_7"
    assert found.images["etis_2"].group == "site/whole"
    assert caplog.messages == [
        "1 groups lie in several parts of the published split, e.g. site/video; their images count "
        "as groups of their own, and scores may profit from it"
    ]


def test_labelled_parts_need_masks(path: Path) -> None:
    images = entries(split())
    bare = {"mask": None, "mask_sha256": None}
    for image_id in ("etis_1", "etis_8"):
        images[image_id] = images[image_id].model_copy(update=bare)
    assert refusal(path, split(), images) == "1 images of labelled parts have no masks, e.g. etis_8"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"CVC-ColonDB": {"labeled_train": [1]}},
            "CVC-ColonDB.labeled_train.0: Input should be a valid string; expected HSSF's lists of "
            "file names",
        ),
        (
            {"more": {"unlabeled_train": ["1.png"]}},
            "more.labeled_train: Field required; expected HSSF's lists of file names",
        ),
        (
            {"more": {"labeled_train": ["1.png"]}},
            "found public sets: CVC-ColonDB, more; expected one domain with labeled_train alone",
        ),
        (
            {"more": {"labeled_train": ["1.png"], "unlabeled_train": ["2.png"]}},
            "client 'more' has 1 labelled training images; a samfed client has none, expected an "
            "empty labeled_train",
        ),
    ],
)
def test_a_split_of_another_kind_is_refused(
    path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert refusal(path, split() | changes, entries(split())) == expected


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_published(path, {}, config())
    assert str(caught.value) == f"partition.file: {path} does not exist"


def test_a_broken_file(path: Path) -> None:
    path.write_text('{"public": {"labeled_train": [')
    with pytest.raises(DataError, match="not valid JSON"):
        read_published(path, {}, config())


def test_prepare_takes_such_a_split(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    path.write_text(json.dumps(split()))
    assert write_files(path, root, size_px=32, seed=0) == 30
    request = {"file": str(path)}
    made = prepare(
        tiny_config(root, tmp_path / "cache", data={"image_size": 16}, partition=request)
    )
    saved = load_partition(tmp_path / "cache" / "partition.json")
    assert saved == made.partition
    assert {name: [len(ids) for _, ids in part] for name, part in saved.clients.items()} == {
        "CVC-ClinicDB": [6, 2, 2],
        "EndoTect-ETIS": [6, 1, 3],
    }
