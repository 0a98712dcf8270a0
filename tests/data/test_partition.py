"""Partitions of random folders keep their promises, and a tampered file is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import PartitionConfig
from pipeline.data.drawing import draw_partition
from pipeline.data.partition import (
    ClientPart,
    ImageEntry,
    Partition,
    ServerPart,
    load_partition,
    read_partition_file,
    save_partition,
)
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, DataError, StageError

Records = dict[str, ImageEntry]
Drawn = tuple[ServerPart, dict[str, ClientPart]]


def make_records(groups: list[tuple[str, int, int]]) -> Records:
    """Records of (site, images, images without a mask) groups."""
    records: Records = {}
    for number, (site, count, bare) in enumerate(groups):
        for i in range(count):
            name = f"g{number:02d}_{i}"
            mask = None if i < bare else f"masks/{name}.png"
            records[name] = ImageEntry(
                image=f"images/{name}.png",
                image_sha256="0" * 64,
                mask=mask,
                mask_sha256=mask and "1" * 64,
                site=site,
                group=f"{site}/g{number:02d}",
            )
    return records


def single(count: int, site: str = "s") -> Records:
    return make_records([(site, 1, 0)] * count)


def areas(records: Records) -> dict[str, float]:
    values = np.random.default_rng(len(records)).random(len(records))
    return {i: float(v) for (i, r), v in zip(records.items(), values, strict=True) if r.mask}


def draw(records: Records, config: PartitionConfig, seed: int = 0) -> Drawn:
    return draw_partition(records, config, seed=seed, foreground=areas(records))


def refusal(records: Records, **request: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        draw(records, PartitionConfig(**{"server_site": None, "calibration_min": 1} | request))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@st.composite
def requests(pick: st.DrawFn) -> tuple[Records, PartitionConfig, int]:
    groups = pick(
        st.lists(
            st.tuples(
                st.sampled_from(["north", "south", "west"]),
                st.integers(1, 6),
                st.sampled_from([0, 0, 0, 0, 1, 6]),
            ),
            min_size=12,
            max_size=40,
        )
    )
    records = make_records(groups)
    count = len(records)
    config = PartitionConfig(
        scheme=pick(st.sampled_from(["iid", "dirichlet", "site", "sizes"])),
        clients=pick(st.integers(1, 4)),
        clients_per_site=pick(st.integers(1, 2)),
        sizes=tuple(pick(st.lists(st.integers(6, max(6, count // 5)), min_size=1, max_size=3))),
        by=pick(st.sampled_from(["size", "site"])),
        alpha=pick(st.sampled_from([0.5, 5.0, 100.0])),
        server_images=pick(st.integers(8, max(8, count // 4))),
        server_site=pick(st.sampled_from([None, None, "north"])),
        calibration_fraction=pick(st.sampled_from([0.1, 0.2, 0.4])),
        calibration_min=pick(st.integers(1, 3)),
        val_fraction=pick(st.sampled_from([0.0, 0.1, 0.2])),
        test_fraction=pick(st.sampled_from([0.0, 0.1, 0.3])),
    )
    return records, config, pick(st.integers(0, 5))


def check_promises(records: Records, config: PartitionConfig, drawn: Drawn) -> None:
    server, clients = drawn
    parts = {("server", k): ids for k, ids in server.model_dump().items()}
    for name, part in clients.items():
        parts |= {(name, split): ids for split, ids in part.model_dump().items()}
    every = [image_id for ids in parts.values() for image_id in ids]
    assert len(every) == len(set(every))
    owner: dict[str, tuple[str, str]] = {}
    for place, ids in parts.items():
        for image_id in ids:
            assert owner.setdefault(records[image_id].group, place) == place
            if place[0] == "server" or place[1] in ("val", "test"):
                assert records[image_id].mask is not None
    assert server.train
    assert len(server.calibration) >= config.calibration_min
    training, calibrating = ({records[i].group for i in ids} for _, ids in server)
    assert len(calibrating) >= 2 or len(training) + len(calibrating) < 4
    assert len(server.train) + len(server.calibration) <= config.server_images
    if config.server_site:
        assert {records[i].site for i in server.train} == {config.server_site}
    for part in clients.values():
        total = len(part.train) + len(part.val) + len(part.test)
        assert part.train
        assert len(part.test) <= max(6, round(config.test_fraction * total))  # one group at least
        assert len(part.val) <= max(6, round(config.val_fraction * total))
        groups = {records[i].group for _, ids in part for i in ids}
        bare = {r.group for r in records.values() if r.mask is None}
        assert bool(part.test) == (config.test_fraction > 0 and bool(groups - bare))
        assert part.val == () or config.val_fraction > 0
    check_scheme(records, config, drawn)


def check_scheme(records: Records, config: PartitionConfig, drawn: Drawn) -> None:
    server, clients = drawn
    totals = [sum(map(len, part.model_dump().values())) for part in clients.values()]
    used = len(server.train) + len(server.calibration) + sum(totals)
    if config.scheme == "sizes":
        assert len(clients) == len(config.sizes)
        assert all(n <= size for n, size in zip(totals, config.sizes, strict=True))
    else:
        assert used == len(records)  # nothing is left over
    if config.scheme == "iid":
        assert len(clients) == config.clients
        assert max(totals) - min(totals) <= 6  # by a group at most
    if config.scheme == "dirichlet":
        assert len(clients) == config.clients
    if config.scheme == "site":
        for name, part in clients.items():
            assert {records[i].site for i in part.train} == {name.split("_")[0]}


def test_random_partitions_keep_their_promises() -> None:
    outcomes: list[bool] = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(requests())
    def check(request: tuple[Records, PartitionConfig, int]) -> None:
        records, config, seed = request
        try:
            drawn = draw(records, config, seed)
        except ConfigError as error:
            outcomes.append(False)
            assert str(error).startswith("partition")  # noqa: PT017
            return
        outcomes.append(True)
        check_promises(records, config, drawn)
        backwards = dict(reversed(records.items()))
        again = draw_partition(backwards, config, seed=seed, foreground=areas(records))
        assert again == drawn

    check()
    assert sum(outcomes) > len(outcomes) / 2  # most requests can be met


@pytest.mark.parametrize(
    ("patients", "calibrating"), [(2, 1), (3, 1), (4, 2), (9, 2), (12, 3), (16, 4), (40, 4)]
)
def test_the_calibration_part_has_several_patients(patients: int, calibrating: int) -> None:
    """Of ten images each, so that one patient would do for ``calibration_min``."""
    records = make_records([("a", 10, 0)] * patients + [("b", 1, 0)] * 4)
    config = PartitionConfig(
        server_images=10 * patients,
        server_site="a",
        calibration_fraction=0.01,
        scheme="iid",
        clients=1,
    )
    server, _ = draw(records, config)
    assert len({records[i].group for i in server.calibration}) == calibrating


@pytest.mark.parametrize("seed", range(20))
def test_a_smaller_calibration_part_keeps_several_patients(seed: int) -> None:
    """Three images of twenty: by chance alone one patient in five draws."""
    records = make_records([("a", 10, 0)] * 8 + [("b", 1, 0)] * 4)
    base: dict[str, Any] = {"server_images": 80, "server_site": "a", "calibration_min": 2}
    kept = [
        set(draw(records, PartitionConfig(**base, server_kept=count), seed)[0].calibration)
        for count in (8, 12, 40)
    ]
    assert kept[0] < kept[1] < kept[2]
    assert all(len({records[i].group for i in part}) == 2 for part in kept)


def test_another_seed_draws_another_partition() -> None:
    config = PartitionConfig(server_site=None, server_images=10, calibration_min=2)
    records = single(60)
    assert draw(records, config, 0) == draw(records, config, 0)
    assert draw(records, config, 0) != draw(records, config, 1)


def test_a_low_alpha_is_skewed_and_a_high_one_is_not() -> None:
    records = single(400)
    spread = {}
    for alpha in (0.5, 1000.0):
        config = PartitionConfig(
            scheme="dirichlet",
            alpha=alpha,
            server_site=None,
            server_images=20,
            calibration_min=2,
            test_fraction=0.0,
        )
        sizes = [len(part.train) for part in draw(records, config)[1].values()]
        spread[alpha] = max(sizes) - min(sizes)
    assert spread[1000.0] < 15 < spread[0.5]


# --------------------------------------------------------------------------- requests refused


def test_more_clients_than_groups() -> None:
    assert refusal(single(10), scheme="iid", clients=9, server_images=4) == (
        "partition.clients: 9 clients, but only 6 images in 6 groups are left after the server's; "
        "lower it"
    )


def test_clients_too_small_to_split() -> None:
    assert refusal(single(10), scheme="iid", clients=6, server_images=4) == (
        "partition: client 'client_00' has 1 images (groups: 1), too few to give it a train and a "
        "test part; use fewer clients, or more images"
    )


def test_a_site_too_small_to_split() -> None:
    records = make_records([("s", 1, 0)] * 9 + [("t", 4, 0)])
    assert refusal(records, scheme="site", server_site="s", server_images=4) == (
        "partition: client 't' has 4 images (groups: 1), too few to give it a train and a test "
        "part; give its images to another site in sites.csv, or set partition.scheme: iid"
    )


def test_too_many_server_images() -> None:
    assert refusal(single(10), server_images=11) == (
        "partition.server_images: 11 asked for, 10 labelled images are there; lower it or add masks"
    )
    records = make_records([("a", 1, 0)] * 3 + [("a", 1, 1)] + [("b", 1, 0)] * 9)
    assert refusal(records, server_images=4, server_site="a") == (
        "partition.server_images: 4 asked for, 3 labelled images are there at a; lower it or add "
        "masks"
    )


def test_a_server_without_masks() -> None:
    records = make_records([("a", 1, 1)] * 9 + [("b", 1, 0)] * 9)
    assert refusal(records, server_images=4, server_site="a") == (
        "partition.server_images: 4 asked for, found no masks at a; add some, or choose another "
        "server_site"
    )
    assert refusal(make_records([("a", 1, 1)] * 9), server_images=4) == (
        "partition.server_images: 4 asked for, found no masks in data.root; add some"
    )


def test_a_client_without_masks_trains_and_is_not_tested(caplog: pytest.LogCaptureFixture) -> None:
    records = make_records([("a", 1, 0)] * 20 + [("b", 2, 1)] * 3 + [("c", 1, 1)])
    config = PartitionConfig(server_images=8, server_site="a", calibration_min=2)
    _, clients = draw(records, config)
    assert [len(ids) for _, ids in clients["b"]] == [6, 0, 0]
    assert [len(ids) for _, ids in clients["c"]] == [1, 0, 0]
    assert clients["a"].test
    assert caplog.messages == [
        "2 of 3 clients have no group with masks, so they train and are not tested: b, c"
    ]
    caplog.clear()
    draw(records, config.model_copy(update={"test_fraction": 0.0}))
    assert caplog.messages == []


def test_unknown_server_site() -> None:
    records = make_records([("b", 2, 0), ("a", 2, 0)])
    assert refusal(records, server_site="c") == (
        "partition.server_site: found no site 'c'; expected one of a, b"
    )


def test_sizes_too_large() -> None:
    assert refusal(single(20), scheme="sizes", sizes=(10, 7), server_images=4) == (
        "partition.sizes: 17 images asked for, 16 are left after the server's; lower them"
    )


def test_calibration_that_takes_all() -> None:
    assert refusal(single(20), server_images=4, calibration_min=4) == (
        "partition.server_images: of 4 images the calibration part takes all (at least 4, in "
        "whole groups, of which there are 4); raise server_images, or lower calibration_min or "
        "_fraction"
    )


def test_dirichlet_over_size_needs_masks_at_the_clients() -> None:
    records = make_records([("a", 1, 0)] * 6 + [("b", 1, 1)] * 20)
    text = refusal(records, scheme="dirichlet", server_images=6, server_site="a")
    assert text == "partition.by: 'size' needs masks, found none; use by: site"


# --------------------------------------------------------------------------- the file


def as_partition(records: Records, drawn: Drawn) -> Partition:
    server, clients = drawn
    return Partition(scheme="iid", seed=0, server=server, clients=clients, images=records)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Records]:
    """A partition file over groups of two images, some with names outside ASCII."""
    records = make_records([("K\u00f6ln", 2, 0)] * 20)
    config = PartitionConfig(server_site=None, server_images=8, calibration_min=2)
    path = tmp_path / "partition.json"
    save_partition(path, as_partition(records, draw(records, config)))
    return path, records


def test_round_trip(written: tuple[Path, Records], tmp_path: Path) -> None:
    path, records = written
    partition = load_partition(path)
    assert read_partition_file(path, records) == partition
    save_partition(tmp_path / "again.json", partition)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"partition.json", "again.json"}


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    with pytest.raises(StageError) as stage:
        load_partition(path)
    assert str(stage.value) == f"{path}: not found; run `samfed prepare` first"


def _client(raw: dict[str, Any]) -> dict[str, Any]:
    client: dict[str, Any] = next(iter(raw["clients"].values()))
    return client


def _in_two_parts(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    _client(raw)["train"].append(image_id)
    return f"image {image_id} is in server train and in "


def _twice_in_one_part(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    raw["server"]["train"].append(image_id)
    return f"image {image_id} is listed twice in server train"


def _straddling(raw: dict[str, Any]) -> str:
    image_id = _client(raw)["train"].pop()
    _client(raw)["test"].append(image_id)
    return f"group {raw['images'][image_id]['group']} is in "


def _unknown_id(raw: dict[str, Any]) -> str:
    raw["server"]["calibration"].append("nowhere")
    return "'nowhere' of server calibration has no entry in images"


def _no_entry(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    del raw["images"][image_id]
    return f"'{image_id}' of server train has no entry in images"


def _leads_out(raw: dict[str, Any]) -> str:
    raw["clients"]["../elsewhere"] = {"train": [], "val": [], "test": []}
    return "client '../elsewhere' cannot name a folder; rename it"


def _named_server(raw: dict[str, Any]) -> str:
    raw["clients"]["server"] = {"train": [], "val": [], "test": []}
    return "client 'server' cannot name a folder; rename it"


def _other_format(raw: dict[str, Any]) -> str:
    raw["format"] = 2
    return "format 2, this samfed reads format 1"


def _other_key(raw: dict[str, Any]) -> str:
    raw["sever"] = raw.pop("server")
    return "server: Field required; expected a samfed partition"


def _no_mapping(raw: dict[str, Any]) -> str:
    raw["clients"] = [1]
    return "clients: Input should be a valid dictionary; expected a samfed partition"


SHA256_PATTERN = "expected 64 hexadecimal digits in lower case; expected a samfed partition"


def _no_digest(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    raw["images"][image_id]["image_sha256"] = "x" * 64
    return f"images.{image_id}.image_sha256: {SHA256_PATTERN}"


def _no_mask_digest(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    raw["images"][image_id]["mask_sha256"] = "0" * 63
    return f"images.{image_id}.mask_sha256: {SHA256_PATTERN}"


def _mask_without_digest(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    raw["images"][image_id]["mask_sha256"] = None
    return f"images.{image_id}: found a mask without its mask_sha256; expected a samfed partition"


def _no_path(raw: dict[str, Any]) -> str:
    image_id = raw["server"]["train"][0]
    raw["images"][image_id]["image"] = "images/\0.png"
    return f"images.{image_id}.image: String should match pattern"


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize(
    "file",
    [
        "../x.png",
        "/etc/x.png",
        "masks/../../x.png",
        "..\\x.png",
        "C:\\x.png",
        "C:x.png",
        "//h/s/x.png",
    ],
)
def test_a_file_outside_of_the_data_is_refused(
    written: tuple[Path, Records], kind: str, file: str
) -> None:
    path, _ = written
    raw = json.loads(path.read_text())
    image_id = raw["server"]["train"][0]
    raw["images"][image_id][kind] = file
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError) as caught:
        load_partition(path)
    assert str(caught.value) == (
        f"{path}: images.{image_id}.{kind}: '{file}' leads out of data.root; expected a samfed "
        "partition; delete it and run `samfed prepare`"
    )


@pytest.mark.parametrize(
    "tamper",
    [
        _no_digest,
        _no_mask_digest,
        _mask_without_digest,
        _no_path,
        _in_two_parts,
        _twice_in_one_part,
        _straddling,
        _unknown_id,
        _no_entry,
        _leads_out,
        _named_server,
        _other_format,
        _other_key,
        _no_mapping,
    ],
)
def test_a_tampered_file_is_refused(
    written: tuple[Path, Records], tamper: Callable[[dict[str, Any]], str]
) -> None:
    path, _ = written
    raw = json.loads(path.read_text())
    expected = tamper(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError) as caught:
        load_partition(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).removeprefix(f"{path}: ").startswith(expected)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nest of dicts and lists; the first of each long list or dict of images."""
    found = [path]
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys if len(keys) < 7 else keys[:1]:
            found += places(value[key], (*path, key))
    return found


def test_a_wrong_type_anywhere_gets_one_line(written: tuple[Path, Records]) -> None:
    path, _ = written
    whole = path.read_text()
    refused = 0
    for place in places(json.loads(whole)):
        for wrong in (None, 7, 1e999, "\ud800", [], ["a", 1], {}, {"a": None}):
            raw = json.loads(whole)
            value = raw
            for key in place[:-1]:
                value = value[key]
            if place:
                value[place[-1]] = wrong
            path.write_text(json.dumps(raw if place else wrong))
            try:
                load_partition(path)
            except DataError as error:
                refused += 1
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
    assert refused > 100


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text('{"format": 1,')
    with pytest.raises(DataError) as caught:
        load_partition(path)
    assert str(caught.value).startswith(f"{path}: not valid JSON (")
    assert str(caught.value).endswith("); delete it and run `samfed prepare`")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
              "(char 1)); expected a partition"),
        ('{"format": 1}', "scheme: Field required; expected a samfed partition"),
    ],
)  # fmt: skip
def test_nobody_is_told_to_delete_a_partition_of_their_own(
    tmp_path: Path, content: str, fault: str
) -> None:
    path = tmp_path / "published.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_partition_file(path, {})
    assert str(caught.value) == f"{path}: {fault}"


def test_an_image_that_is_not_there(written: tuple[Path, Records]) -> None:
    path, records = written
    del records["g03_1"]
    with pytest.raises(DataError) as caught:
        read_partition_file(path, records)
    assert str(caught.value) == f"{path}: image 'g03_1' is not in data.root; expected every one"


# --------------------------------------------------------------------------- with real files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 16 pixels with masks, in groups of two."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    rows = ["image_id,site,group"]
    for i in range(12):
        for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            values = rng.integers(0, 2, shape, dtype=np.uint8) * 255
            Image.fromarray(values).save(root / kind / f"i{i:02d}.png")
        rows.append(f"i{i:02d},north,{i // 2}")
    (root / "sites.csv").write_text("\n".join(rows) + "\n")
    return root


REQUEST = {"server_images": 4, "server_site": None, "calibration_min": 2}
SMALL = {"image_size": 16}


def listing(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_published_partition_is_repeated(folder: Path, tmp_path: Path) -> None:
    first = tiny_config(folder, tmp_path / "first", data=SMALL, partition=REQUEST)
    drawn = prepare(first)
    published = tmp_path / "first" / "partition.json"
    request = REQUEST | {"file": str(published)}
    again = tiny_config(folder, tmp_path / "again", data=SMALL, partition=request, seed=5)
    assert prepare(again) == drawn
    assert listing(tmp_path / "again") == listing(tmp_path / "first")


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_published_partition_refuses_other_files(folder: Path, tmp_path: Path, kind: str) -> None:
    drawn = prepare(
        tiny_config(folder, tmp_path / "first", data=SMALL, partition=REQUEST)
    ).partition
    image_id = drawn.server.train[0]
    path = folder / f"{kind}s" / f"{image_id}.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    request = REQUEST | {"file": str(tmp_path / "first" / "partition.json")}
    again = tiny_config(folder, tmp_path / "again", data=SMALL, partition=request)
    with pytest.raises(DataError) as caught:
        prepare(again)
    assert str(caught.value) == (
        f"partition.file: {kind} of '{image_id}' has another sha256 than the partition says; use "
        "the files that it was made of"
    )
    assert not (tmp_path / "again").exists()


def test_oracle_labels_that_are_missing_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    prepare(config, with_oracle=True)
    before = listing(tmp_path / "cache")
    drawn = load_partition(tmp_path / "cache" / "partition.json")
    for image_id in drawn.clients["north"].train:
        (folder / "masks" / f"{image_id}.png").unlink()
    with pytest.raises(DataError) as caught:
        prepare(config, with_oracle=True)
    first = drawn.clients["north"].train[0]
    assert str(caught.value) == (
        f"--with-oracle: 4 of 4 training images of the clients have no masks, e.g. '{first}'; add "
        "them, or prepare without it"
    )
    assert listing(tmp_path / "cache") == before


def test_an_oracle_of_an_earlier_partition_does_not_stay(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    prepare(config, with_oracle=True)
    assert (tmp_path / "cache" / "oracle").is_dir()
    prepare(config.model_copy(update={"seed": 3}))
    assert not (tmp_path / "cache" / "oracle").exists()


def test_stopping_between_stores_and_partition_is_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    prepare(config)

    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "partition.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config.model_copy(update={"seed": 3}))
    with pytest.raises(StageError):  # never new images beside the old partition
        load_partition(tmp_path / "cache" / "partition.json")


@pytest.mark.parametrize(("images", "named"), [(4, True), (8, False)])
def test_a_calibration_part_of_one_patient_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, images: int, named: bool
) -> None:
    """Patients have two images each: two make D_p at first, and four then."""
    request = REQUEST | {"server_images": images, "scheme": "iid", "clients": 1}
    prepare(tiny_config(folder, tmp_path / "cache", data=SMALL, partition=request))
    told = [text for text in caplog.messages if "is a single patient or video" in text]
    assert len(told) == named


def test_preparing_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    result = prepare(config)
    before = listing(tmp_path / "cache")
    assert prepare(config) == result
    assert listing(tmp_path / "cache") == before
    said = result.as_json()
    del said["data.root"]["sites"], said["data.root"]["mask_decisions"]  # tests/data/test_survey.py
    assert said == {
        "data.root": {
            "images": 12,
            "masks": 12,
            "groups": 6,
            "ignored_files": 0,
            "ignored_subfolders": 0,
            "rows_without_image": 0,
        },
        "server": {"train": 2, "calibration": 2},
        "north": {"train": 4, "val": 2, "test": 2},
    }
    lines = result.text().splitlines()
    assert lines[0] == "12 images, 12 masks, 6 groups"
    assert lines[-2:] == ["server: 2 train, 2 calibration", "north: 4 train, 2 val, 2 test"]


def test_a_smaller_server_set_changes_nothing_else() -> None:
    records = make_records([("a", 4, 0)] * 10 + [("b", 1, 0)] * 30)
    base: dict[str, Any] = {"server_images": 20, "server_site": "a", "calibration_min": 2}
    server, clients = draw(records, PartitionConfig(**base))
    before: set[str] = set()
    for kept in (5, 10, 15, 20):
        part, same = draw(records, PartitionConfig(**base, server_kept=kept))
        assert same == clients
        assert len(part.train) + len(part.calibration) == kept
        assert set(part.train) <= set(server.train)
        assert set(part.calibration) <= set(server.calibration)
        assert before <= {*part.train, *part.calibration}
        before = {*part.train, *part.calibration}
    assert part == server


def test_a_server_set_too_small_for_calibration() -> None:
    assert refusal(single(40), server_images=30, server_kept=8, calibration_min=10) == (
        "partition.server_kept: of 8 images the calibration part takes 10; raise server_kept or "
        "lower calibration_min"
    )


def test_the_partition_stays_where_its_stores_cannot_be_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    prepare(config)
    before, real = listing(tmp_path / "cache"), os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "cache" / "images" and ".building" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        prepare(config.model_copy(update={"seed": 3}))
    assert listing(tmp_path / "cache") == before


@pytest.mark.parametrize("part", ["images", "oracle"])
def test_a_part_of_the_cache_behind_a_link(folder: Path, tmp_path: Path, part: str) -> None:
    """It is written where the link leads, as often as one likes."""
    plain = tiny_config(folder, tmp_path / "plain", data=SMALL, partition=REQUEST)
    config = tiny_config(folder, tmp_path / "cache", data=SMALL, partition=REQUEST)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / part).symlink_to(tmp_path / "elsewhere" / part)
    for seed in (3, 0):
        for each in (plain, config):
            prepare(each.model_copy(update={"seed": seed}), with_oracle=True)
        assert (tmp_path / "cache" / part).is_symlink()
        assert os.listdir(tmp_path / "elsewhere") == [part]
        expected = {k: v for k, v in listing(tmp_path / "plain").items() if k.startswith(part)}
        assert listing(tmp_path / "elsewhere") == expected != {}
